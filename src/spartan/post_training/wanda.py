r"""Wanda: weights times the norm of their inputs, compared within each output.

    score_ij = |w_ij| · |x_j|₂,    |x_j|₂² = H_jj

Each output keeps the same number of weights (those of a layer that its number of outputs does not
divide go to its first outputs), or all it has. Where a unit spans several outputs, bands of outputs
are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spartan.post_training.grams import LayerProblem
from spartan.post_training.solver import LayerSolver, Solution


@dataclass(frozen=True)
class Wanda(LayerSolver):
    """Keep what is large times its inputs, evenly over outputs; the weights stay as they are.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    ICLR 2024, section 3.
    """

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "weights times norms of inputs; one pass over the data, no update"
    paper: ClassVar[str] = "Sun et al., ICLR 2024"
    step_cost: ClassVar[str] = "one pass over the data"
    fits: ClassVar[bool] = False

    def prune(self, problem: LayerProblem, kept: int) -> Solution:
        tiling = problem.tiling
        norms = problem.gram.hessian.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        scores = (problem.grouped(problem.dense.abs()) * norms[:, None]).flatten(0, 1)
        scores = tiling.pool(scores)
        if tiling.kept_of is not None:
            return Solution(tiling.largest(scores, kept), problem.dense)
        there = tiling.pool(problem.dense.abs()) > 0
        order = scores.where(there, -1.0).argsort(dim=1, descending=True, stable=True)
        place = torch.arange(tiling.units[1], device=scores.device)
        stays = place < _even(there.sum(dim=1), kept)[:, None]
        units = torch.zeros_like(there).scatter(1, order, stays)
        return Solution(units, problem.dense)


def _even(available: Tensor, kept: int) -> Tensor:
    """Divide a number over bands, as evenly as what each of them has allows."""
    kept = min(kept, int(available.sum()))
    levels = torch.arange(int(available.max()) + 1, device=available.device)
    totals = torch.minimum(available[None], levels[:, None]).sum(dim=1)
    level = int((totals <= kept).sum()) - 1
    shares = available.clamp(max=level)
    more = (available > level).nonzero().squeeze(1)[: kept - int(totals[level])]
    shares[more] += 1
    return shares
