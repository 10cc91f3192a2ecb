"""Weights as (outputs, inputs) matrices, and sparsity patterns as tiles on them.

A convolution's inputs are ordered by kernel position first, channel second: what a pattern groups
(blocks, and rows of N:M) then lies side by side in a row of the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from spartan.errors import PatternError
from spartan.selection.hard import hard_topk, select_rows
from spartan.weights.patterns import Pattern
from spartan.weights.prunable import Prunable


def to_matrix(tensor: Tensor, weight: Prunable) -> Tensor:
    """Return a tensor of the weight's shape as a matrix (outputs, kernel positions x inputs)."""
    oriented = tensor.transpose(0, 1) if weight.input_first else tensor
    return oriented.movedim(1, -1).reshape(oriented.shape[0], -1)


def from_matrix(matrix: Tensor, weight: Prunable) -> Tensor:
    """Return a matrix of `to_matrix` in the shape that the weight is stored in."""
    outputs, inputs, *kernel = weight.oriented_shape
    oriented = matrix.reshape(outputs, *kernel, inputs).movedim(-1, 1)
    return (oriented.transpose(0, 1) if weight.input_first else oriented).contiguous()


@dataclass(frozen=True)
class Tiling:
    """A pattern on a matrix: tiles of `rows` x `cols` that live or die together.

    Attributes:
        shape: Shape of the matrix.
        rows: Outputs of a tile.
        cols: Inputs of a tile.
        kept_of: For N:M, (n, m): how many of how many neighbouring inputs stay.
    """

    shape: tuple[int, int]
    rows: int = 1
    cols: int = 1
    kept_of: tuple[int, int] | None = None

    @property
    def units(self) -> tuple[int, int]:
        """Number of tiles along outputs and inputs."""
        return self.shape[0] // self.rows, self.shape[1] // self.cols

    @property
    def count(self) -> int:
        """Number of tiles."""
        return math.prod(self.units)

    def pool(self, values: Tensor) -> Tensor:
        """Sum a matrix, or whole tiles of its columns, over each tile."""
        if self.rows == self.cols == 1:
            return values
        return values.reshape(self.units[0], self.rows, -1, self.cols).sum(dim=(1, 3))

    def spread(self, units: Tensor) -> Tensor:
        """Repeat the value of each tile over its entries."""
        if self.rows == self.cols == 1:
            return units
        return units.repeat_interleave(self.rows, 0).repeat_interleave(self.cols, 1)

    def largest(self, scores: Tensor, kept: int) -> Tensor:
        """Mark the `kept` tiles of largest score, or the n largest of every m.

        Args:
            scores: One for each tile, or a part of the tiles.
            kept: How many of these stay.
        """
        if self.kept_of is not None:
            n, m = self.kept_of
            return select_rows(scores.reshape(-1, m), n).reshape(scores.shape)
        return hard_topk(scores, kept)


def tiling_of(weight: Prunable, pattern: Pattern) -> Tiling:
    """Return how a pattern divides a weight as a matrix.

    Raises:
        PatternError: The pattern does not fit, or groups more than tiles of the matrix.
    """
    pattern.unit_shape(weight)  # refuses what does not divide
    outputs = weight.oriented_shape[0]
    tile = pattern.tile(weight)
    if tile is None:
        raise PatternError(
            "After training, weights are pruned unstructured, in blocks or N:M, not by "
            f"{pattern}: whole channels need training (spartan.Sparsifier)."
        )
    return Tiling((outputs, weight.numel // outputs), *tile, pattern.fixed_ratio)


def nonzero_units(weights: Sequence[Prunable], pattern: Pattern) -> dict[str, Tensor]:
    """Return the units of weights in which something is not zero, by name."""
    kept = {}
    for weight in weights:
        matrix = to_matrix(weight.parameter.detach(), weight)
        kept[weight.name] = tiling_of(weight, pattern).pool((matrix != 0).float()) > 0
    return kept
