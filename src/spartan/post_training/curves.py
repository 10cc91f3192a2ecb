r"""Allocation from measured curves: what does it cost the network to prune each layer so far?

Every layer by itself is pruned to a number of densities (largest weights, refitted by least squares
to the dense inputs) while all others stay dense, and the network's divergence from the dense one is
measured on calibration samples. Between the measured densities, log-loss is a line in the
log-density. A dynamic program then finds the densities, one for each layer from a grid, with the
smallest sum of losses within the budget. That sum is not the loss of the network in which all are
pruned, but its order serves.

Source: Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022, section 5 (the database and
its solver).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from spartan.post_training.distillation import Distillation
from spartan.post_training.grams import LayerProblem
from spartan.post_training.layers import DAMPING, problems
from spartan.post_training.least_squares import refit
from spartan.post_training.matrices import from_matrix
from spartan.post_training.network import Network, write

MEASURED = (0.5, 0.3, 0.2, 0.12, 0.07, 0.04, 0.02, 0.01)
Array = np.ndarray[Any, np.dtype[np.float64]]
_GRID = 96  # densities of the dynamic program, geometric from 1 to the smallest
_BUCKETS = 4_000  # of the budget
_SAMPLES = 256  # that losses are measured on, at most


def curve_densities(network: Network, how: Distillation) -> list[float]:
    """Return the densities of all layers with the smallest sum of measured losses.

    Args:
        network: The network.
        how: What measures the divergence.
    """
    losses = measure_curves(network, how)
    grid = np.geomspace(1.0, 1e-3, _GRID)
    tables = [interpolate(curve, grid) for curve in losses]
    limits = network.limits
    wholes = [n * c for n, c in zip(limits.units, limits.costs, strict=True)]
    least = [k / n for k, n in zip(limits.least, limits.units, strict=True)]
    chosen = cheapest(tables, grid, wholes, least, limits.budget)
    return [float(grid[i]) for i in chosen]


def measure_curves(network: Network, how: Distillation) -> list[dict[float, float]]:
    """Return for each weight the divergence of the network at the measured densities of it alone.

    Weights that the calibration data do not reach cost nothing at any density.
    """
    curves: list[dict[float, float]] = [dict.fromkeys(MEASURED, 0.0) for _ in network.weights]
    samples = network.fit
    if len(samples) > _SAMPLES:
        samples = samples.split(_SAMPLES, network.seed)[1]
    references = how.references(network.dense, samples)
    model, weights = network.scratch()
    for index, problem in problems(network, network.dense, DAMPING):
        before = weights[index].parameter.detach().clone()
        for density in MEASURED:
            kept = max(1, round(density * problem.tiling.count))
            write(weights[index], from_matrix(_pruned(problem, kept), weights[index]))
            curves[index][density] = how.loss_on(model, references)
        write(weights[index], before)
        network.tick("curves", len([c for c in curves if any(c.values())]), len(network.reach))
    return curves


def _pruned(problem: LayerProblem, kept: int) -> torch.Tensor:
    tiling = problem.tiling
    units = tiling.largest(tiling.pool(problem.dense.abs()), kept)
    return refit(problem, tiling.spread(units))


def interpolate(curve: dict[float, float], grid: Array) -> Array:
    """Return losses on a grid of densities, from measured ones made monotone; 0 at density 1."""
    densities = sorted(curve)
    losses = np.maximum.accumulate([curve[d] for d in reversed(densities)])[::-1]
    logs = np.log(np.maximum(losses, 1e-12))
    x, points = np.log(grid), np.log(densities)
    inside = np.interp(x, points, logs)
    # Outside the measured range the end's slope goes on: the loss rises the thinner it gets.
    slope = min(0.0, (logs[1] - logs[0]) / (points[1] - points[0]))
    below = logs[0] + slope * (x - points[0])
    values = np.exp(np.where(x < points[0], below, inside))
    share = (1.0 - grid) / (1.0 - densities[-1])
    result: Array = np.where(grid > densities[-1], values * share, values)
    return result


def cheapest(
    tables: Sequence[Array],
    grid: Array,
    wholes: Sequence[float],
    least: Sequence[float],
    budget: float,
) -> list[int]:
    """Return for each layer an index into the grid: the smallest sum of losses within the budget.

    Args:
        tables: Loss of each layer at each density of the grid.
        grid: Densities.
        wholes: Cost of each layer at density 1.
        least: Smallest density of each layer.
        budget: What the layers may cost together.
    """
    # The smallest choices always fit; what they leave of the budget is divided into buckets.
    allowed = [[i for i, d in enumerate(grid) if d >= low] or [0] for low in least]
    floors = [whole * grid[choices[-1]] for whole, choices in zip(wholes, allowed, strict=True)]
    left = budget - sum(floors)
    if left <= 0:
        return [choices[-1] for choices in allowed]
    bucket = left / _BUCKETS
    best = np.zeros(_BUCKETS + 1)
    taken: list[Any] = []
    for table, whole, floor, choices in zip(tables, wholes, floors, allowed, strict=True):
        after = np.full(_BUCKETS + 1, math.inf)
        choice = np.zeros(_BUCKETS + 1, dtype=np.int64)
        for i in choices:
            need = math.ceil((whole * grid[i] - floor) / bucket - 1e-9)
            if need > _BUCKETS:
                continue
            cost = np.full(_BUCKETS + 1, math.inf)
            cost[need:] = best[: _BUCKETS + 1 - need] + table[i]
            better = cost < after
            after[better], choice[better] = cost[better], i
        best = after
        taken.append(choice)
    place = _BUCKETS
    chosen = []
    for table_choice, whole, floor in zip(
        reversed(taken), reversed(wholes), reversed(floors), strict=True
    ):
        i = int(table_choice[place])
        chosen.append(i)
        place -= math.ceil((whole * grid[i] - floor) / bucket - 1e-9)
    return chosen[::-1]
