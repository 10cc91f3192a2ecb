"""Layers to prune, with calibration data made up for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spartan.post_training.grams import Gram, LayerProblem
from spartan.post_training.matrices import tiling_of, to_matrix
from spartan.weights.patterns import Pattern, Unstructured
from spartan.weights.prunable import Prunable


def make_problem(
    outputs: int = 8,
    inputs: int = 12,
    pattern: Pattern | None = None,
    damping: float = 1e-6,
    shift: float = 0.0,
    groups: int = 1,
    seed: int = 0,
) -> tuple[LayerProblem, Tensor, Tensor]:
    """Return a layer with correlated inputs, its dense and its pruned network's inputs."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = Prunable("w", nn.Parameter(draw(outputs, inputs)))
    mixing = torch.eye(inputs, dtype=torch.float64) + draw(inputs, inputs) / inputs**0.5
    dense = mixing @ draw(groups, inputs, 200)
    pruned = dense + shift * draw(groups, inputs, 200)
    matrix = to_matrix(weight.parameter.detach(), weight)
    answers = matrix.unflatten(0, (groups, -1)) @ dense
    gram = Gram(pruned @ pruned.mT, dense @ pruned.mT, answers.square().sum(2).flatten(), 200)
    tiling = tiling_of(weight, pattern or Unstructured())
    return LayerProblem(weight, tiling, matrix, gram, damping), dense, pruned


def squared_error(problem: LayerProblem, matrix: Tensor, dense: Tensor, pruned: Tensor) -> float:
    """Return |W₀ X₀ - W X|², from the inputs themselves."""
    grouped = matrix.unflatten(0, (len(dense), -1)), problem.dense.unflatten(0, (len(dense), -1))
    return float((grouped[1] @ dense - grouped[0] @ pruned).square().sum())
