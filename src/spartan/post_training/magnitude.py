"""Largest weights: the baseline that needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spartan.post_training.base import LayerMethod, Solution
from spartan.post_training.grams import LayerProblem


@dataclass(frozen=True)
class Magnitude(LayerMethod):
    """Keep the units with the largest sum of |w|; the weights stay as they are."""

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "the baseline: largest weights, no data"
    paper: ClassVar[str] = "Han et al., NeurIPS 2015"
    step_cost: ClassVar[str] = "milliseconds"
    needs_gram: ClassVar[bool] = False

    def prune(self, problem: LayerProblem, kept: int) -> Solution:
        tiling = problem.tiling
        scores = tiling.pool(problem.dense.abs())
        return Solution(tiling.largest(scores, kept), problem.dense)
