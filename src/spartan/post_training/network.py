"""`Network`: dense model, pruned copy, calibration samples and budget of a compression."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spartan.always_sparse.conversion import sparse_layers
from spartan.budgets.budget import Budget
from spartan.budgets.layer_bounds import LayerBounds, least_units
from spartan.copies import copy_model
from spartan.errors import PrunableError
from spartan.post_training.calibration import Calibration
from spartan.post_training.grams import Reach
from spartan.post_training.matrices import Tiling, nonzero_units, tiling_of
from spartan.weights.names import plain_name, wrapper_prefix
from spartan.weights.patterns import Pattern
from spartan.weights.prunable import Prunable

Tick = Callable[[str, int, int], None]  # phase, what is done of it, all of it


@dataclass
class Network:
    """A network that is being compressed.

    Attributes:
        dense: The dense model, in evaluation mode; it does not change.
        pruned: Its copy, which does.
        weights: Prunable weights of the dense model.
        targets: The same of the copy.
        reach: How the calibration data reach them, by index, in the order of a pass.
        pattern: How weights divide into units.
        budget: What was asked for.
        bounds: What the layers may keep: of weights in the order of `weights`.
        fit: Calibration samples to compress with.
        held_out: Those to stop early by.
        batch_size: Samples of a batch.
        seed: Decides what is drawn.
        max_layer_sparsity: No layer loses more.
        tick: Told how far it has come.
    """

    dense: nn.Module
    pruned: nn.Module
    weights: list[Prunable]
    targets: list[Prunable]
    reach: dict[int, Reach]
    pattern: Pattern
    budget: Budget
    bounds: LayerBounds
    fit: Calibration
    held_out: Calibration
    batch_size: int
    seed: int
    max_layer_sparsity: float
    tick: Tick

    @property
    def tilings(self) -> list[Tiling]:
        """How each weight divides into units."""
        return [tiling_of(weight, self.pattern) for weight in self.weights]

    def batches(self) -> list[Any]:
        """Return the samples to compress with, in batches."""
        return self.fit.batches(self.batch_size)

    def fresh_copy(self) -> tuple[nn.Module, list[Prunable]]:
        """Return another copy of the dense model, and its weights."""
        model = evaluating_copy(self.dense)
        return model, counterparts(self.weights, model)


def evaluating_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy in evaluation mode.

    Raises:
        SpartanError: The model cannot be copied.
    """
    return copy_model(model).eval()


def counterparts(weights: Sequence[Prunable], model: nn.Module) -> list[Prunable]:
    """Return the weights of the same names in a copy of their model."""
    prefix = wrapper_prefix(model)
    named = {plain_name(name, prefix): p for name, p in model.named_parameters()}
    return [dataclasses.replace(w, parameter=named[w.name]) for w in weights]


def bounds_of(
    model: nn.Module,
    weights: Sequence[Prunable],
    pattern: Pattern,
    budget: Budget,
    max_layer_sparsity: float,
) -> LayerBounds:
    """Return what layers may keep, together and each.

    Raises:
        BudgetError: The budget cannot be met with a unit in every layer.
        PatternError: The pattern does not fit.
    """
    units = [tiling_of(weight, pattern).count for weight in weights]
    fraction = budget.fraction
    assert fraction is not None
    if pattern.fixed_ratio is not None:
        budget.plan(model, weights, pattern)  # refuses densities that are not n / m
    of_weights = budget.costs_per_weight(model, weights)
    costs = [c * pattern.unit_numel(w) for c, w in zip(of_weights, weights, strict=True)]
    if len(set(costs)) == 1:
        costs = [1.0] * len(costs)
    total = sum(n * c for n, c in zip(units, costs, strict=True))
    kept = round(fraction * sum(units)) if set(costs) == {1.0} else float(fraction) * total
    # Units that are zero already are as good as pruned.
    most = [int(mask.sum()) for mask in nonzero_units(weights, pattern).values()]
    least = [min(n, m) for n, m in zip(least_units(units, max_layer_sparsity), most, strict=True)]
    return LayerBounds([w.name for w in weights], units, costs, least, most, kept)


def write(target: Prunable, values: Tensor) -> None:
    """Write values into a weight, in its dtype."""
    with torch.no_grad():
        target.parameter.copy_(values)


def require_dense(model: nn.Module) -> None:
    """Raise `PrunableError` if a model has always-sparse layers."""
    if sparse_layers(model):
        raise PrunableError(
            "The model has always-sparse layers, which are as sparse as they will get: make them "
            "dense with always_sparse.to_dense to compress it."
        )
