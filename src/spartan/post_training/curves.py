r"""Sparsity allocation from the measured loss curve of each layer, by dynamic programming.

The network is first pruned to a starting allocation (largest weights, refitted by least squares).
Then one layer at a time is pruned to each of a number of densities instead, and the divergence from
the dense network is measured on calibration samples, where the other layers are what they will be
like. Between the measured densities, log-loss is a line in the log-density. A dynamic program finds
the densities, one for each layer from a grid, with the smallest sum of losses within the budget.
That sum is not the loss of the network in which all change at once, but its order serves.

Source: Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022, section 5 (the database and
its solver).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from spartan.post_training.distillation import Distillation, References
from spartan.post_training.grams import LayerProblem
from spartan.post_training.layers import problems
from spartan.post_training.least_squares import refit
from spartan.post_training.matrices import from_matrix
from spartan.post_training.network import Network, write

# Densities at which the loss of each layer is measured: a factor of about 0.6 apart, between which
# the log of the loss is taken for a line in the log of the density.
MEASURED = (1.0, 0.6, 0.4, 0.25, 0.16, 0.1, 0.06, 0.035, 0.02, 0.01)
Array = np.ndarray[Any, np.dtype[np.float64]]
_GRID = 96  # densities of the dynamic program, geometric from 1 to the smallest
# Of the budget. Costs are rounded up to a bucket, so that each layer wastes less than 1/4000 of it;
# the time is layers x densities x buckets.
_BUCKETS = 4_000
_SAMPLES = 256  # that losses are measured on, at most: ten passes over them for every layer


def curve_densities(network: Network, how: Distillation, start: Sequence[int]) -> list[float]:
    """Return the densities of all layers with the smallest sum of measured losses.

    Args:
        network: The network.
        how: What measures the divergence.
        start: Units that each layer keeps while others are measured.
    """
    losses = measure_curves(network, how, start)
    grid = np.geomspace(1.0, 1e-3, _GRID)
    tables = [interpolate_losses(curve, grid) for curve in losses]
    bounds = network.bounds
    wholes = [n * c for n, c in zip(bounds.units, bounds.costs, strict=True)]
    least = [k / n for k, n in zip(bounds.least, bounds.units, strict=True)]
    chosen = cheapest(tables, grid, wholes, least, bounds.budget)
    return [float(grid[i]) for i in chosen]


def measure_curves(
    network: Network, how: Distillation, start: Sequence[int]
) -> list[dict[float, float]]:
    """Return for each weight the divergence of the network at the measured densities of it.

    Weights that the calibration data do not reach cost nothing at any density.
    """
    curves: list[dict[float, float]] = [dict.fromkeys(MEASURED, 0.0) for _ in network.weights]
    samples = network.fit
    if len(samples) > _SAMPLES:
        samples = samples.split(_SAMPLES, network.seed)[1]
    references = References(network.dense, samples, how.batch_size)
    model, weights = network.fresh_copy()
    for index, problem in problems(network, (model, weights)):
        write(weights[index], from_matrix(_pruned(problem, start[index]), weights[index]))
    layers = problems(network, (model, weights))
    for done, (index, problem) in enumerate(layers, start=1):
        before = weights[index].parameter.detach().clone()
        for density in MEASURED:
            kept = max(1, round(density * problem.tiling.count))
            write(weights[index], from_matrix(_pruned(problem, kept), weights[index]))
            curves[index][density] = how.loss_on(model, references)
        write(weights[index], before)
        network.tick("curves", done, len(network.reach))
    return curves


def _pruned(problem: LayerProblem, kept: int) -> torch.Tensor:
    tiling = problem.tiling
    units = tiling.largest(tiling.pool(problem.dense.abs()), kept)
    return refit(problem, tiling.spread(units))


def interpolate_losses(curve: dict[float, float], grid: Array) -> Array:
    """Return losses on a grid of densities, from measured ones made monotone."""
    densities = sorted(curve)
    losses = np.maximum.accumulate([curve[d] for d in reversed(densities)])[::-1]
    logs, points = np.log(np.maximum(losses, 1e-12)), np.log(densities)
    x = np.log(grid)
    # Below what was measured the end's slope goes on: the loss rises the thinner it gets.
    slope = min(0.0, (logs[1] - logs[0]) / (points[1] - points[0]))
    below = logs[0] + slope * (x - points[0])
    result: Array = np.exp(np.where(x < points[0], below, np.interp(x, points, logs)))
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
