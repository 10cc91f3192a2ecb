"""The contract of methods that prune one layer after the other, and the two simplest of them.

A method is given one layer as a matrix, with the Gram matrices of its calibration inputs, and the
number of units that may stay; it answers with what stays and with which values. Allocation comes
before it, and reconstruction may follow; it knows of neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spartan.post_training.grams import LayerProblem
from spartan.registry import Registered


@dataclass(frozen=True)
class Solution:
    """What stays of a layer.

    Attributes:
        units: Which units of the tiling stay, boolean.
        matrix: The weight, double precision; its values outside the units count as zero.
    """

    units: Tensor
    matrix: Tensor


class LayerSolver(Registered, ABC):
    """Base of the methods that see one layer at a time."""

    scheduled: ClassVar[bool] = False
    needs_gram: ClassVar[bool] = True  # whether it looks at the calibration data
    fits: ClassVar[bool] = True  # whether it changes weights to fit them

    @abstractmethod
    def prune(self, problem: LayerProblem, kept: int) -> Solution:
        """Choose the `kept` units of a layer, or n of every m, and their values."""


@dataclass(frozen=True)
class MagnitudeSolver(LayerSolver):
    """Keep the units with the largest sum of |w|; the weights stay as they are."""

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "the baseline: largest weights, no data"
    paper: ClassVar[str] = "Han et al., NeurIPS 2015"
    step_cost: ClassVar[str] = "milliseconds"
    needs_gram: ClassVar[bool] = False
    fits: ClassVar[bool] = False

    def prune(self, problem: LayerProblem, kept: int) -> Solution:
        tiling = problem.tiling
        scores = tiling.pool(problem.dense.abs())
        return Solution(tiling.largest(scores, kept), problem.dense)


@dataclass(frozen=True, eq=False)
class FixedUnits(LayerSolver):
    """Keep units that were chosen elsewhere, with the dense weights.

    Attributes:
        units: Of each weight, by name.
    """

    units: dict[str, Tensor]

    name: ClassVar[str] = "fixed-units"
    needs_gram: ClassVar[bool] = False
    fits: ClassVar[bool] = False

    def prune(self, problem: LayerProblem, kept: int) -> Solution:
        return Solution(self.units[problem.weight.name], problem.dense)
