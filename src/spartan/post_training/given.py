"""Masks that were found elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spartan.patterns import Pattern
from spartan.post_training.base import LayerMethod, Solution
from spartan.post_training.grams import LayerProblem
from spartan.post_training.matrices import tiling_of, to_matrix
from spartan.prunable import Prunable


@dataclass(frozen=True, eq=False)
class Given(LayerMethod):
    """Keep given units, with the dense weights.

    Attributes:
        units: Of each weight, by name.
    """

    units: dict[str, Tensor]

    name: ClassVar[str] = "given"
    needs_gram: ClassVar[bool] = False

    def prune(self, problem: LayerProblem, kept: int) -> Solution:
        return Solution(self.units[problem.weight.name], problem.dense)


def kept_by(weights: Sequence[Prunable], pattern: Pattern) -> dict[str, Tensor]:
    """Return the units of weights in which something is not zero, by name."""
    kept = {}
    for weight in weights:
        matrix = to_matrix(weight.parameter.detach(), weight)
        kept[weight.name] = tiling_of(weight, pattern).pool((matrix != 0).float()) > 0
    return kept
