r"""Optimal brain surgeon on each layer: remove what costs least, let the others answer, repeat.

For one output row w with H its inputs' Gram matrix and P the inputs it still has, removing the
tile B of inputs and refitting the rest raises the squared error by

    Δ_B = w_B ([(H_PP)⁻¹]_BB)⁻¹ w_Bᵀ,        w ← w - w_B ([(H_PP)⁻¹]_BB)⁻¹ [(H_PP)⁻¹]_B:

and H⁻¹ loses those rows and columns by a Schur complement. Rows that share a tile are removed
together, and their costs add up. The costs in the order of removal are the row's *trace*. A layer's
mask at any density is where its traces, made monotone, are cut at one height; the weights that stay
are then refitted at once, which gives what the updates would have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spartan.post_training.base import LayerMethod, Solution
from spartan.post_training.grams import LayerProblem
from spartan.post_training.least_squares import refit, unconstrained
from spartan.post_training.matrices import Tiling

_CHUNK = 1 << 18  # entries of the inverses that are worked on at a time: they fit a core's cache


@dataclass(frozen=True)
class OBS(LayerMethod):
    """Greedy removal by second-order cost, then exact least squares on what stays.

    Source: Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022, section 4 (ExactOBS).
    """

    name: ClassVar[str] = "obs"
    summary: ClassVar[str] = "the best layer by layer, for layers of up to a thousand inputs"
    paper: ClassVar[str] = "Frantar and Alistarh, NeurIPS 2022"
    step_cost: ClassVar[str] = "outputs x inputs³ for each layer"

    def prune(self, problem: LayerProblem, kept: int) -> Solution:
        tiling = problem.tiling
        if tiling.kept_of is None and kept == tiling.count:
            units = torch.ones(tiling.units, dtype=torch.bool, device=problem.dense.device)
        else:
            units = cut(trace(problem), kept, tiling)
        return Solution(units, refit(problem, tiling.spread(units)))


def trace(problem: LayerProblem) -> Trace:
    """Remove the tiles of each band of rows one by one, each time the cheapest.

    For N:M patterns the removal ends where n of every m are left.
    """
    tiling = problem.tiling
    bands = tiling.units[0]
    matrix = unconstrained(problem).reshape(bands, tiling.rows, -1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(problem.damped))
    # A band of rows lies in one group of outputs, or each of its rows counts as the first's.
    first = torch.arange(bands, device=matrix.device) * tiling.rows
    group = first * len(inverse) // tiling.shape[0]
    size = max(1, _CHUNK // tiling.shape[1] ** 2)
    parts = [
        _trace_bands(matrix[part], inverse[group[part]], tiling)
        for part in torch.arange(bands, device=matrix.device).split(size)
    ]
    costs, order = (torch.cat(which) for which in zip(*parts, strict=True))
    return Trace(costs, order)


@dataclass(frozen=True)
class Trace:
    """What the removal of each band's tiles costs.

    Attributes:
        costs: Rise of the squared error at each removal, (bands, removals).
        order: Tile that is removed, of the same shape.
    """

    costs: Tensor
    order: Tensor

    @property
    def heights(self) -> Tensor:
        """The costs, made monotone: what a common cut has to reach to remove so many."""
        return self.costs.cummax(dim=1).values


def cut(trace: Trace, kept: int, tiling: Tiling) -> Tensor:
    """Return the units that stay when the cheapest are removed, over all bands."""
    if tiling.kept_of is None:
        # Of removals at the same height, the last ones stay: reversed, they come first.
        stays = tiling.largest(trace.heights.flip(1).contiguous(), kept).flip(1)
    else:
        stays = torch.zeros_like(trace.order, dtype=torch.bool)
    units = torch.ones(tiling.units, dtype=torch.bool, device=trace.order.device)
    return units.scatter(1, trace.order, stays)


def _trace_bands(matrix: Tensor, inverse: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Remove all tiles of some bands: matrix (bands, rows, inputs), inverse (bands, inputs²)."""
    bands, _, width = matrix.shape
    tiles = width // tiling.cols
    matrix, inverse = matrix.clone(), inverse.clone()
    names = torch.arange(tiles, device=matrix.device).expand(bands, -1).clone()
    alive = torch.ones(bands, tiles, dtype=torch.bool, device=matrix.device)
    allowed = _allowance(tiling, bands, tiles, matrix.device)
    one = torch.arange(bands, device=matrix.device)
    costs, order = [], []
    for _ in range(tiles if tiling.kept_of is None else allowed.limit):
        if 2 * int(alive[0].sum()) <= names.shape[1]:
            # Every band has lost as many: what is gone is cut out of the inverses.
            matrix, inverse, names, alive = _compact(matrix, inverse, names, alive, tiling.cols)
        cost, answer = _removals(matrix, inverse, tiling.cols)
        cost = cost.masked_fill(~alive | allowed.refused(names), torch.inf)
        cheapest = cost.argmin(dim=1)
        costs.append(cost[one, cheapest])
        order.append(names[one, cheapest])
        answer(cheapest)
        alive[one, cheapest] = False
        allowed.take(order[-1])
    return torch.stack(costs, dim=1).clamp(min=0), torch.stack(order, dim=1)


def _removals(
    matrix: Tensor, inverse: Tensor, cols: int
) -> tuple[Tensor, Callable[[Tensor], None]]:
    """Return what the removal of each tile costs, and a function that removes one of each band.

    Removed inputs have 1 on the diagonal of the inverse and 0 elsewhere.
    """
    bands, rows, width = matrix.shape
    one = torch.arange(bands, device=matrix.device)
    if cols == 1:
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        cost = matrix.square().sum(dim=1) / diagonal

        def remove(which: Tensor) -> None:
            column = inverse[one, which]
            pivot = diagonal[one, which].clone()
            scaled = column / pivot[:, None]
            matrix.baddbmm_(matrix[one, :, which][:, :, None], scaled[:, None], alpha=-1)
            inverse.baddbmm_(column[:, :, None], scaled[:, None], alpha=-1)
            inverse[one, which] = 0
            inverse[one, :, which] = 0
            inverse[one, which, which] = 1
            matrix[one, :, which] = 0

        return cost, remove
    tiles = width // cols
    blocks = inverse.view(bands, tiles, cols, tiles, cols).diagonal(dim1=1, dim2=3)
    inner = torch.linalg.inv(blocks.movedim(-1, 1))  # (bands, tiles, cols, cols)
    parts = matrix.view(bands, rows, tiles, cols).transpose(1, 2)
    cost = ((parts @ inner) * parts).sum(dim=(2, 3))

    def remove_tile(which: Tensor) -> None:
        inputs = which[:, None] * cols + torch.arange(cols, device=which.device)
        lines = inverse[one[:, None], inputs]
        scaled = inner[one, which] @ lines
        matrix.baddbmm_(parts[one, which], scaled, alpha=-1)
        inverse.baddbmm_(lines.mT.contiguous(), scaled, alpha=-1)
        inverse[one[:, None], inputs] = 0
        inverse[one[:, None], :, inputs] = 0
        inverse[one[:, None], inputs, inputs] = 1
        matrix[one[:, None], :, inputs] = 0

    return cost, remove_tile


def _compact(
    matrix: Tensor, inverse: Tensor, names: Tensor, alive: Tensor, cols: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    left = int(alive[0].sum())
    tiles = alive.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :left]
    inputs = (tiles[:, :, None] * cols + torch.arange(cols, device=tiles.device)).flatten(1)
    one = torch.arange(len(matrix), device=tiles.device)[:, None]
    matrix = matrix.gather(2, inputs[:, None].expand(-1, matrix.shape[1], -1))
    inverse = inverse[one[:, :, None], inputs[:, :, None], inputs[:, None]]
    return matrix, inverse, names.gather(1, tiles), torch.ones_like(tiles, dtype=torch.bool)


@dataclass
class _Allowance:
    """How many more tiles each group of m may lose; without N:M, all of them."""

    left: Tensor | None
    size: int
    limit: int

    def refused(self, names: Tensor) -> Tensor:
        """Mark the tiles whose group may lose no more."""
        if self.left is None:
            return torch.zeros_like(names, dtype=torch.bool)
        return self.left.gather(1, names // self.size) == 0

    def take(self, tiles: Tensor) -> None:
        """Note that each band has lost one."""
        if self.left is not None:
            self.left.scatter_add_(1, tiles[:, None] // self.size, -torch.ones_like(tiles)[:, None])


def _allowance(tiling: Tiling, bands: int, tiles: int, device: torch.device) -> _Allowance:
    if tiling.kept_of is None:
        return _Allowance(None, 1, tiles)
    n, m = tiling.kept_of
    left = torch.full((bands, tiles // m), m - n, device=device)
    return _Allowance(left, m, tiles // m * (m - n))
