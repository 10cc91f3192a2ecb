r"""Optimal brain surgeon (OBS) per layer: remove the cheapest unit, update the rest, repeat.

For one output row w with H its inputs' Gram matrix and P the inputs it still has, removing the
tile B of inputs and refitting the rest raises the squared error by

    Δ_B = w_B ([(H_PP)⁻¹]_BB)⁻¹ w_Bᵀ,        w ← w - w_B ([(H_PP)⁻¹]_BB)⁻¹ [(H_PP)⁻¹]_B:

and H⁻¹ loses those rows and columns by a Schur complement. Rows that share a tile are removed
together, and their costs add up. The costs in the order of removal are the row's *trace*. A layer's
mask at any density is where its traces, made monotone, reach one height; the weights that stay
are then refitted at once, which gives what the updates would have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spartan.post_training.grams import LayerProblem
from spartan.post_training.least_squares import refit, unconstrained
from spartan.post_training.matrices import Tiling
from spartan.post_training.solver import LayerSolver, Solution

_CHUNK = 1 << 22  # entries of the factors that are worked on at a time: 32 MiB of float64


@dataclass(frozen=True)
class OBS(LayerSolver):
    """Greedy removal by second-order cost, then exact least squares on what stays.

    Source: Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022, section 4 (ExactOBS).
    """

    name: ClassVar[str] = "obs"
    summary: ClassVar[str] = "the best layer by layer, for layers of up to some hundred inputs"
    paper: ClassVar[str] = "Frantar and Alistarh, NeurIPS 2022"
    step_cost: ClassVar[str] = "outputs x inputs³ for each layer"

    def prune(self, problem: LayerProblem, kept: int) -> Solution:
        tiling = problem.tiling
        if tiling.kept_of is None and kept == tiling.count:
            units = torch.ones(tiling.units, dtype=torch.bool, device=problem.dense.device)
        else:
            units = units_to_keep(removal_order(problem), kept, tiling)
        return Solution(units, refit(problem, tiling.spread(units)))


def removal_order(problem: LayerProblem) -> Trace:
    """Remove the tiles of each band of rows one by one, each time the cheapest.

    For N:M patterns the removal ends where n of every m are left.
    """
    tiling = problem.tiling
    bands = tiling.units[0]
    matrix = unconstrained(problem).reshape(bands, tiling.rows, -1)
    inverse = torch.cholesky_inverse(problem.factor)
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
        """The costs, made monotone: what a common threshold has to reach to remove so many."""
        return self.costs.cummax(dim=1).values


def units_to_keep(trace: Trace, kept: int, tiling: Tiling) -> Tensor:
    """Return the units that stay when the cheapest are removed, over all bands."""
    if tiling.kept_of is None:
        # Of removals at the same height, the last ones stay: reversed, they come first.
        stays = tiling.largest(trace.heights.flip(1).contiguous(), kept).flip(1)
    else:
        stays = torch.zeros_like(trace.order, dtype=torch.bool)
    units = torch.ones(tiling.units, dtype=torch.bool, device=trace.order.device)
    return units.scatter(1, trace.order, stays)


def _trace_bands(matrix: Tensor, inverse: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Remove all tiles of some bands: matrix (bands, rows, inputs), inverse (bands, inputs²).

    The inverse of a band after k removals is what it was at first minus V Vᵀ, with a column of V
    for each input that was removed, as in a Cholesky factorisation: only what is read of it, its
    diagonal blocks and the lines of the tile that goes, is ever formed.
    """
    bands, rows, width = matrix.shape
    cols, tiles = tiling.cols, width // tiling.cols
    matrix = matrix.clone()
    blocks = inverse.view(bands, tiles, cols, tiles, cols).diagonal(dim1=1, dim2=3)
    blocks = blocks.movedim(-1, 1).contiguous()  # (bands, tiles, cols, cols)
    alive = torch.ones(bands, tiles, dtype=torch.bool, device=matrix.device)
    allowed = _allowance(tiling, bands, tiles, matrix.device)
    steps = tiles if tiling.kept_of is None else allowed.limit
    factor = matrix.new_empty(bands, steps * cols, width)  # Vᵀ
    one = torch.arange(bands, device=matrix.device)
    costs, order = [], []
    for step in range(steps):
        inner = blocks.reciprocal() if cols == 1 else torch.linalg.inv(blocks)
        parts = matrix.view(bands, rows, tiles, cols).transpose(1, 2)
        answers = parts * inner if cols == 1 else parts @ inner
        scores = (answers * parts).sum(dim=(2, 3))
        scores = scores.masked_fill(~alive | allowed.refused, torch.inf)
        tile = scores.argmin(dim=1)
        costs.append(scores[one, tile])
        order.append(tile)
        inputs = tile[:, None] * cols + torch.arange(cols, device=tile.device)
        known = factor[:, : step * cols]
        lines = inverse[one[:, None], inputs]
        lines -= known.gather(2, inputs[:, None].expand(-1, step * cols, -1)).mT @ known
        matrix.baddbmm_(answers[one, tile], lines, alpha=-1)
        corner = lines.gather(2, inputs[:, None].expand(-1, cols, -1))
        if cols == 1:
            new = lines / corner.sqrt()
        else:
            new = torch.linalg.solve_triangular(torch.linalg.cholesky(corner), lines, upper=False)
        factor[:, step * cols : (step + 1) * cols] = new
        by_tile = new.view(bands, cols, tiles, cols).transpose(1, 2)
        blocks -= by_tile.mT @ by_tile if cols > 1 else by_tile.square()
        alive[one, tile] = False
        blocks[one, tile] = torch.eye(cols, dtype=blocks.dtype, device=blocks.device)
        matrix.view(bands, rows, tiles, cols)[one, :, tile] = 0
        allowed.take(tile)
    return torch.stack(costs, dim=1).clamp(min=0), torch.stack(order, dim=1)


@dataclass
class _Allowance:
    """How many more tiles each group of m may lose; without N:M, all of them."""

    left: Tensor | None
    size: int
    limit: int

    @property
    def refused(self) -> Tensor | bool:
        """Which tiles are in a group that may lose no more."""
        if self.left is None:
            return False
        return (self.left == 0).repeat_interleave(self.size, dim=1)

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
