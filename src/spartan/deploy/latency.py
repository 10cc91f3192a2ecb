"""Latency budgets: measured seconds per weight, and the density that meets a time.

The time of a layer is close to a line over its density, while a sparse kernel runs it. The slopes
of these lines are the costs of the selection. How much may be kept is then searched for with the
whole model: select, accelerate, measure, correct.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spartan.budgets.allocation import refuse_dead_layers
from spartan.budgets.budget import Budget
from spartan.budgets.group_budget import GroupBudget, make_group_budget
from spartan.deploy.accelerating import accelerate, plan_of
from spartan.deploy.plan import Plan
from spartan.errors import BudgetError
from spartan.kernels.units import pool_magnitudes
from spartan.selection.hard import hard_topk
from spartan.weights.patterns import Pattern, check_fits
from spartan.weights.prunable import Prunable

# Where each layer is timed: where sparse kernels win, and its time is a line in its density.
_DENSITIES = (0.02, 0.08, 0.25)
_SMALLEST = 0.002  # fraction of the cost that is kept at least
# The search ends this near the time asked for (relative; medians are noisy), or after so many
# rounds, each of which narrows the bracket.
_CLOSE, _ROUNDS = 0.03, 8
_SECONDS = 0.04  # to measure a layer
# A weight that no sparse kernel runs, relative to the dearest: it is kept.
_FREE = 1e-6


def plan_latency(
    budget: Budget, model: nn.Module, weights: Sequence[Prunable], pattern: Pattern
) -> list[GroupBudget]:
    """Divide a budget of milliseconds over groups of weights, by measuring the model.

    Args:
        budget: One with `latency_ms`.
        model: The model; it is not changed.
        weights: Its prunable weights.
        pattern: How they will be pruned.

    Raises:
        BudgetError: The time cannot be reached, or needs no pruning, or the pattern leaves nothing
            to choose.
    """
    if pattern.fixed_ratio is not None:
        raise BudgetError(f"{pattern} fixes the density of every layer: no time can be chosen.")
    latency_ms = budget.latency_ms
    assert latency_ms is not None
    check_fits(pattern, weights)
    units = [math.prod(pattern.unit_shape(w)) for w in weights]
    model_facts = model, weights, pattern
    if budget.allocation == "uniform":
        density = density_for_latency(*model_facts, None, latency_ms, budget.example_input)
        ones = [1.0] * len(weights)
        budgets = [
            make_group_budget([i], units, ones, Fraction(density)) for i in range(len(weights))
        ]
        refuse_dead_layers(budgets, weights, units)
        return budgets
    per_weight = seconds_per_weight(*model_facts, latency_ms, budget.example_input)
    costs = [
        pattern.unit_numel(w) * seconds for w, seconds in zip(weights, per_weight, strict=True)
    ]
    density = density_for_latency(*model_facts, costs, latency_ms, budget.example_input)
    return [make_group_budget(range(len(weights)), units, costs, Fraction(density))]


def seconds_per_weight(
    model: nn.Module,
    weights: Sequence[Prunable],
    pattern: Pattern,
    latency_ms: float,
    example_input: Any,
) -> list[float]:
    """Return what one entry of each weight adds to the time of its layer, in seconds.

    Args:
        model: The model; it is not changed.
        weights: Its prunable weights.
        pattern: How they will be pruned.
        latency_ms: The time the model is to take.
        example_input: One input, of the batch size that is to be fast.

    Raises:
        BudgetError: The time needs no pruning, or pruning cannot make the model faster.
    """
    tables: list[list[tuple[float, float]]] = [[] for _ in weights]
    for density in _DENSITIES:
        masks = [_largest(w, pattern, density) for w in weights]
        plan = _measure(model, weights, masks, example_input)
        _check_needed(plan, latency_ms)
        times = {layer.name: layer.sparse for layer in plan.layers if layer.sparse}
        for weight, table in zip(weights, tables, strict=True):
            timing = times.get(weight.name.rpartition(".")[0])
            if timing is not None:
                table.append((density, timing.median))
    slopes = [_slope(table) / w.parameter.numel() for w, table in zip(weights, tables, strict=True)]
    if not any(tables):
        raise BudgetError(
            "No prunable layer of this model runs on a sparse kernel here, so pruning cannot make "
            "it faster: see `spartan doctor`, and which layers `spartan.accelerate` can take."
        )
    if max(slopes) <= 0:
        raise BudgetError(
            "The sparse layers of this model were no slower with more weights: they are too small "
            "to be measured, or the machine is busy. Use a larger batch, or try again on an idle "
            "machine."
        )
    return [max(slope, _FREE * max(slopes)) for slope in slopes]


def density_for_latency(
    model: nn.Module,
    weights: Sequence[Prunable],
    pattern: Pattern,
    unit_costs: Sequence[float] | None,
    latency_ms: float,
    example_input: Any,
) -> float:
    """Return the fraction of the cost that may be kept for the model to take this time.

    Args:
        model: The model; it is not changed.
        weights: Its prunable weights.
        pattern: How they will be pruned.
        unit_costs: Cost of a unit of each weight, by which units of all layers compete; None if
            every layer keeps the same fraction.
        latency_ms: The time.
        example_input: One input, of the batch size that is to take this time.

    Raises:
        BudgetError: The time cannot be reached, or needs no pruning.
    """
    wanted = latency_ms / 1e3

    def time_of(density: float) -> Plan:
        if unit_costs is None:
            masks = [_largest(w, pattern, density) for w in weights]
        else:
            masks = _select(weights, pattern, unit_costs, density)
        return _measure(model, weights, masks, example_input)

    low, high = _SMALLEST, 1.0
    floor = time_of(low)
    dense = _check_needed(floor, latency_ms)
    low_time, high_time = floor.accelerated.median, dense
    if wanted <= low_time:
        raise BudgetError(
            f"latency_ms={latency_ms:g} cannot be reached: with {_SMALLEST:.1%} of its cost kept, "
            f"the model takes {1e3 * low_time:.3g} ms. Ask for more, or for a smaller batch."
        )
    return _search(
        lambda density: time_of(density).accelerated.median,
        wanted,
        (low, low_time),
        (high, high_time),
    )


def _check_needed(plan: Plan, latency_ms: float) -> float:
    """Return the dense model's seconds, if they are more than those wanted."""
    dense: float = plan.dense.median
    if latency_ms >= 1e3 * dense:
        raise BudgetError(
            f"latency_ms={latency_ms:g}: the dense model already takes {1e3 * dense:.3g} ms on "
            "this machine with this input; ask for less."
        )
    return dense


def _search(
    time_of: Callable[[float], float],
    wanted: float,
    below: tuple[float, float],
    above: tuple[float, float],
) -> float:
    """Return a density that takes the wanted time, or the largest one found that takes less.

    Args:
        time_of: Seconds at a density; grows with it, and is noisy.
        wanted: Seconds.
        below: A density that takes less, and its time.
        above: A density that takes more, and its time.
    """
    for _ in range(_ROUNDS):
        (low, low_time), (high, high_time) = below, above
        line = low + (high - low) * (wanted - low_time) / (high_time - low_time)
        # Between following the line and halving on a log scale: times are not quite a line.
        density = math.sqrt(line * math.sqrt(low * high))
        density = min(max(density, low * 1.02), high * 0.98)
        time = time_of(density)
        if abs(time - wanted) <= _CLOSE * wanted:
            return density
        if time < wanted:
            below = density, time
        else:
            above = density, time
    return below[0]


def _measure(
    model: nn.Module, weights: Sequence[Prunable], masks: Sequence[Tensor], example_input: Any
) -> Plan:
    pruned = copy.deepcopy(model)
    parameters = dict(pruned.named_parameters())
    with torch.no_grad():
        for weight, mask in zip(weights, masks, strict=True):
            parameters[weight.name].mul_(mask)
    return plan_of(accelerate(pruned, example_input, seconds=_SECONDS, verbose=False))


def _magnitudes(weight: Prunable, pattern: Pattern) -> Tensor:
    theta = weight.parameter.detach().contiguous()
    return pool_magnitudes(theta, pattern.grid(weight), pattern.unit_shape(weight)).float()


def _largest(weight: Prunable, pattern: Pattern, density: float) -> Tensor:
    """Return the mask that keeps the largest units of one weight."""
    magnitudes = _magnitudes(weight, pattern)
    mask = hard_topk(magnitudes, max(1, round(density * magnitudes.numel())))
    return pattern.spread(mask, weight)


def _select(
    weights: Sequence[Prunable], pattern: Pattern, unit_costs: Sequence[float], density: float
) -> list[Tensor]:
    """Return the masks of a global selection by magnitude per cost."""
    pooled = [_magnitudes(w, pattern) for w in weights]
    mean = sum(c * p.numel() for c, p in zip(unit_costs, pooled, strict=True)) / sum(
        p.numel() for p in pooled
    )
    costs = [torch.full_like(p, c / mean) for p, c in zip(pooled, unit_costs, strict=True)]
    flat_costs = torch.cat([c.flatten() for c in costs])
    kept = hard_topk(
        torch.cat([p.flatten() for p in pooled]),
        density * float(flat_costs.sum(dtype=torch.float64)),
        flat_costs,
    )
    parts = kept.split([p.numel() for p in pooled])
    return [
        pattern.spread(part.view(p.shape), w)
        for part, p, w in zip(parts, pooled, weights, strict=True)
    ]


def _slope(table: Sequence[tuple[float, float]]) -> float:
    """Return seconds per density, by least squares of relative errors; 0 if not measured."""
    if len(table) < 2:
        return 0.0
    densities, times = np.array(table).T
    return float(np.polyfit(densities, times, 1, w=1 / times)[0])
