"""Prunes layers in forward order, each on the inputs that the pruned layers before it give."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from spartan.errors import CalibrationError
from spartan.post_training.grams import GramBuilder, LayerProblem, record_products
from spartan.post_training.layer_by_layer import LayerByLayer, Products
from spartan.post_training.least_squares import refit
from spartan.post_training.matrices import from_matrix, tiling_of, to_matrix
from spartan.post_training.network import Network, write
from spartan.post_training.solver import LayerSolver, MagnitudeSolver
from spartan.post_training.weight_products import WeightProduct
from spartan.weights.prunable import Prunable

DAMPING = 1e-2  # of the mean of a Gram matrix's diagonal, as in the released code of SparseGPT
# Positions an input from which on that is enough. With fewer, as much as so many positions of
# noise as there are inputs: on a language model, with 5 to 12 of them, 0.3 did better than 0.01 on
# text of both kinds; on convolutions, with 57 and more, 0.02 to 0.3 did worse.
_PLENTY = 16
# Inputs of a layer for each position that it was calibrated with, at most: with fewer positions
# most directions of the weights are seen by the damping only.
_SCARCE = 8


@dataclass
class LayerResult:
    """How a layer was solved.

    Attributes:
        error: Relative squared error of its outputs on calibration data, given the pruned
            network's inputs; NaN where that was not measured.
        seconds: Time it took.
        units: What stays of it, boolean.
    """

    error: float
    seconds: float
    units: Tensor


def problems(
    network: Network,
    pruned: tuple[nn.Module, Sequence[Prunable]],
    solves: bool = True,
    fits: bool = True,
) -> Iterator[tuple[int, LayerProblem]]:
    """Yield each weight that the calibration data reach, with its problem, in order of a pass.

    What is written into the pruned model's weight is what the next layers see. Weights that a pass
    reads several times are judged by what the dense network gives them.

    Args:
        network: The network.
        pruned: A copy of the dense model, and its weights.
        solves: Whether the samples have to be enough to solve for weights.
        fits: Whether weights are fitted to them, so that held-out samples judge.

    Raises:
        CalibrationError: There are too few samples for a layer, or its inputs are not finite.
    """
    if solves:
        _require_enough(network)
    weights = network.weights
    model, targets = pruned
    shared = [i for i, reach in network.reach.items() if reach.calls > 1]
    builders = {i: _builder(network, i) for i in shared}
    batches = network.batches()
    kept_back = network.held_out.batches(network.batch_size) if fits else []
    if shared:
        record_products(network.dense, batches, weights, lambda p: _add_shared(builders, p))
    with LayerByLayer(
        network.dense, model, [*batches, *kept_back], (weights, targets), list(network.reach)
    ) as passes:
        for index, products in passes:
            builder, held_out = builders.pop(index, None), None
            if builder is None:
                builder = _gathered(network, index, products[: len(batches)])
                if kept_back:
                    held_out = _gathered(network, index, products[len(batches) :]).gram
            weight, matrix, gram = weights[index], builder.matrix.double(), builder.gram
            damping = _damping(matrix.shape[1], gram.positions)
            tiling = tiling_of(weight, network.pattern)
            yield index, LayerProblem(weight, tiling, matrix, gram, damping, held_out)


def prune_layers(
    network: Network, method: LayerSolver, counts: list[int], refits: bool
) -> dict[str, LayerResult]:
    """Prune every layer of the copy with a method, one after the other.

    Args:
        network: The network.
        method: The method.
        counts: Units that each weight keeps.
        refits: Whether what stays is refitted by least squares.
    """
    results: dict[str, LayerResult] = {}
    began = time.perf_counter()
    for index in set(range(len(counts))) - set(network.reach):
        units = _prune_unreached(network, index, counts[index])
        results[network.weights[index].name] = LayerResult(math.nan, 0.0, units)
    solves = refits or method.needs_gram
    if solves:
        _say_other_uses(network)
    fits = refits or method.fits
    for index, problem in problems(network, (network.pruned, network.targets), solves, fits):
        weight = network.weights[index]
        elsewhere = bool(network.reach[index].other_uses)
        one = MagnitudeSolver() if elsewhere and method.needs_gram else method
        solution = one.prune(problem, counts[index])
        mask = problem.tiling.spread(solution.units)
        matrix = solution.matrix * mask
        if refits and not elsewhere:
            change = refit(problem, mask) - matrix
            matrix += problem.earned(matrix, change) * change
        write(network.targets[index], from_matrix(matrix, weight))
        now = time.perf_counter()
        results[weight.name] = LayerResult(problem.error(matrix), now - began, solution.units)
        began = now
        network.tick("layers", len(results), len(network.weights))
    return results


def _say_other_uses(network: Network) -> None:
    """Name the weights that are more than the matrix of a layer.

    What suits the inputs of the layer would spoil the other use, whose inputs are others.
    """
    told = [
        f"{network.weights[i].name!r} ({', '.join(sorted(reach.other_uses))})"
        for i, reach in network.reach.items()
        if reach.other_uses
    ]
    if told:
        warnings.warn(
            f"Also used in another way than as the matrix of a layer: {', '.join(told)}. They are "
            "pruned by magnitude, and not refitted, since what is solved for one use would spoil "
            "the other. method='fcpts', which trains the whole network, sees all uses.",
            stacklevel=5,
        )


def _prune_unreached(network: Network, index: int, kept: int) -> Tensor:
    """Keep the largest units of a weight that no calibration sample reaches."""
    weight = network.weights[index]
    matrix = to_matrix(weight.parameter.detach(), weight)
    tiling = tiling_of(weight, network.pattern)
    units = tiling.largest(tiling.pool(matrix.float().abs()), kept)
    write(network.targets[index], from_matrix(matrix * tiling.spread(units), weight))
    return units


def _add_shared(builders: dict[int, GramBuilder], product: WeightProduct) -> None:
    if product.index in builders:
        builders[product.index].add(product, product)


def _builder(network: Network, index: int) -> GramBuilder:
    weight = network.weights[index]
    dense = weight.parameter.detach()
    return GramBuilder(weight, dense, network.reach[index], network.seed)


def _damping(inputs: int, positions: int) -> float:
    few = 0 < positions < _PLENTY * inputs
    return max(DAMPING, inputs / positions) if few else DAMPING


def _gathered(network: Network, index: int, products: Sequence[Products | None]) -> GramBuilder:
    builder = _builder(network, index)
    for pair in products:
        if pair is not None:
            builder.add(*pair)
    return builder


def _require_enough(network: Network) -> None:
    for index, reach in network.reach.items():
        weight = network.weights[index]
        inputs = weight.numel // weight.oriented_shape[0]
        if reach.positions * _SCARCE < inputs:
            factor = inputs / (reach.positions * _SCARCE)
            raise CalibrationError(
                f"{weight.name!r} has {inputs:,} inputs, and {len(network.fit)} calibration "
                f"samples give it {reach.positions:,} positions: that says too little of them. "
                f"Give at least {int(len(network.fit) * factor) + 1} samples, or use "
                "method='magnitude' without reconstruct='layer'."
            )
