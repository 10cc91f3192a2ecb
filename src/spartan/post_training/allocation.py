"""Allocation of sparsity to layers: global, uniform, ERK, learned or measured curves.

`global` lets the weights of all layers compete by magnitude, `uniform` gives every layer the same
density, `erk` more to small ones (Evci et al., 2020), `learned` lets the network learn thresholds
(FCPTS), `curves` measures what each layer costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from spartan.budgets.allocation import erk_densities
from spartan.budgets.budget import Budget
from spartan.budgets.layer_bounds import fit_counts
from spartan.errors import MethodError, did_you_mean
from spartan.kernels import Scores, masks_of
from spartan.methods.masking.fcpts import FCPTS
from spartan.post_training.curves import curve_densities
from spartan.post_training.distillation import Distillation, distil
from spartan.post_training.matrices import to_matrix
from spartan.post_training.network import Network
from spartan.selection.hard import find_cutoff

ALLOCATIONS = ("global", "uniform", "erk", "learned", "curves")


Allocation = str | Mapping[str, float]


def check_allocation(allocation: Allocation) -> None:
    """Raise `MethodError` if there is no such allocation."""
    if not isinstance(allocation, str | Mapping):
        raise MethodError(f"allocation={allocation!r} must be a name, or densities by name.")
    if isinstance(allocation, str) and allocation not in ALLOCATIONS:
        hint = did_you_mean(allocation, ALLOCATIONS)
        raise MethodError(f"Unknown allocation {allocation!r}; {hint}")


def allocate(network: Network, allocation: Allocation, how: Distillation) -> list[int]:
    """Return how many units each layer keeps.

    Args:
        network: The network.
        allocation: One of `ALLOCATIONS`, or densities by name, which the budget may move.
        how: How thresholds are learned; with a quarter of the steps.

    Raises:
        MethodError: Densities are missing, or of weights that are not there.
    """
    if not isinstance(allocation, str):
        return fit_counts(_given(network, allocation), network.bounds)
    whole = network.bounds.budget / network.bounds.cost(network.bounds.units)
    ways: dict[str, Callable[[], Sequence[float]]] = {
        "global": lambda: _global(network),
        "uniform": lambda: [whole] * len(network.weights),
        "erk": lambda: _erk(network),
        "learned": lambda: _learned(network, how),
        "curves": lambda: curve_densities(network, how, fit_counts(_erk(network), network.bounds)),
    }
    return fit_counts(ways[allocation](), network.bounds)


def _given(network: Network, densities: Mapping[str, float]) -> list[float]:
    names = [weight.name for weight in network.weights]
    for name, density in densities.items():
        if name not in names:
            raise MethodError(f"allocation= names {name!r}; {did_you_mean(name, names)}")
        if not 0 <= density <= 1:
            raise MethodError(f"The density of {name!r} is {density}, outside [0, 1].")
    missing = [name for name in names if name not in densities]
    if missing:
        raise MethodError(f"allocation= gives no density for {', '.join(map(repr, missing))}.")
    return [densities[name] for name in names]


def _global(network: Network) -> list[float]:
    scores, scales = [], []
    for weight, tiling, cost in zip(
        network.weights, network.tilings, network.bounds.costs, strict=True
    ):
        matrix = to_matrix(weight.parameter.detach(), weight)
        matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
        scores.append(tiling.pool(matrix.abs()).contiguous())
        scales.append(1.0 / (cost * tiling.rows * tiling.cols))
    all_scores = Scores(scores, scales, list(network.bounds.costs), absolute=False)
    masks = masks_of(all_scores, find_cutoff(all_scores, network.bounds.budget))
    return [float(mask.sum()) / mask.numel() for mask in masks]


def _erk(network: Network) -> list[float]:
    bounds = network.bounds
    totals = [n * c for n, c in zip(bounds.units, bounds.costs, strict=True)]
    shapes = [tuple(weight.shape) for weight in network.weights]
    return erk_densities(shapes, bounds.budget / sum(totals), totals)


def _learned(network: Network, how: Distillation) -> list[float]:
    """Learn thresholds on a copy; what counts is how much it keeps of each layer."""
    model, weights = network.fresh_copy()
    shorter = dataclasses.replace(how, steps=max(20, how.steps // 4))
    method = FCPTS(max_layer_sparsity=network.max_layer_sparsity)
    budget = Budget(
        density=network.budget.density,
        sparsity=network.budget.sparsity,
        cost=network.budget.cost,
        example_input=network.budget.example_input,
    )
    distil(network, model, method, budget, shorter)
    return [float(w.parameter.count_nonzero()) / w.numel for w in weights]
