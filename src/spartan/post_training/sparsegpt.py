r"""SparseGPT: prunes columns from left to right, and corrects each error in those after it.

With U the upper Cholesky factor of (H + r I)⁻¹, Uᵀ U = (H + r I)⁻¹, the error of removing w_j when
the columns before j are fixed is w_j² / U_jj², and the best answer of the columns after j to it

    w_{j:}  ←  w_{j:} - (w_j / U_jj) U_{j,j:}

Masks are chosen for `block` columns at a time (N:M: for m), over all outputs together; every block
keeps its count.
Here it starts from the weights that answer best to the inputs that the pruned layers before give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spartan.budgets.allocation import round_to_sum
from spartan.errors import MethodError
from spartan.post_training.grams import LayerProblem
from spartan.post_training.least_squares import unconstrained
from spartan.post_training.solver import LayerSolver, Solution


@dataclass(frozen=True)
class SparseGPT(LayerSolver):
    """One sweep over the columns, with the errors passed on.

    Attributes:
        block: Columns for which masks are chosen at once.

    Raises:
        MethodError: `block` is below 1.

    Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
    One-Shot", ICML 2023, section 3.
    """

    block: int = 128

    name: ClassVar[str] = "sparsegpt"
    summary: ClassVar[str] = "one sweep with error propagation; for large layers"
    paper: ClassVar[str] = "Frantar and Alistarh, ICML 2023"
    step_cost: ClassVar[str] = "inputs³ for each layer"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise MethodError(f"block={self.block} must be at least 1.")

    def prune(self, problem: LayerProblem, kept: int) -> Solution:
        tiling = problem.tiling
        inverse = torch.cholesky_inverse(problem.factor)
        upper = torch.linalg.cholesky(inverse, upper=True)
        matrix = unconstrained(problem)
        units = torch.zeros(tiling.units, dtype=torch.bool, device=matrix.device)
        width = max(1, self.block // tiling.cols) * tiling.cols
        if tiling.kept_of is not None:
            width = tiling.kept_of[1]
        starts = list(range(0, tiling.shape[1], width))
        ends = [min(start + width, tiling.shape[1]) for start in starts]
        wanted = [kept * (b - a) / tiling.shape[1] for a, b in zip(starts, ends, strict=True)]
        for start, end, count in zip(starts, ends, round_to_sum(wanted, kept), strict=True):
            part = problem.grouped(matrix[:, start:end])
            deviation = upper.diagonal(dim1=1, dim2=2)[:, None, start:end]
            scores = tiling.pool((part / deviation).square().flatten(0, 1))
            chosen = tiling.largest(scores, count)
            units[:, start // tiling.cols : end // tiling.cols] = chosen
            removed = problem.grouped(~tiling.spread(chosen))
            self._sweep(problem.grouped(matrix), upper, removed, start, end)
        return Solution(units, matrix)

    @staticmethod
    def _sweep(matrix: Tensor, upper: Tensor, removed: Tensor, start: int, end: int) -> None:
        """Remove the chosen weights of some columns, and let all columns after them answer."""
        errors = torch.zeros_like(matrix[:, :, start:end])
        block = matrix[:, :, start:end]
        for j in range(end - start):
            at = start + j
            error = block[:, :, j] * removed[:, :, j] / upper[:, None, at, at]
            block[:, :, j:] -= error[:, :, None] * upper[:, None, at, at:end]
            errors[:, :, j] = error
        matrix[:, :, end:] -= errors @ upper[:, start:end, end:]
