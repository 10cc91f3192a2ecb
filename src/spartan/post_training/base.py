"""The contract of methods that prune one layer after the other.

A method is given one layer as a matrix, with the Gram matrices of its calibration inputs, and the
number of units that may stay; it answers with what stays and with which values. Allocation comes
before it, and reconstruction may follow; it knows of neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spartan.described import Described
from spartan.post_training.grams import LayerProblem


@dataclass(frozen=True)
class Solution:
    """What stays of a layer.

    Attributes:
        units: Which units of the tiling stay, boolean.
        matrix: The weight, double precision; its values outside the units count as zero.
    """

    units: Tensor
    matrix: Tensor


class LayerMethod(Described, ABC):
    """Base of the methods that see one layer at a time."""

    scheduled: ClassVar[bool] = False
    needs_gram: ClassVar[bool] = True  # whether it looks at the calibration data

    @abstractmethod
    def prune(self, problem: LayerProblem, kept: int) -> Solution:
        """Choose the `kept` units of a layer, or n of every m, and their values."""
