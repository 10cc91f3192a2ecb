"""Static sparse training: a random graph that never changes; the growth methods' baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spartan.methods.growth.contract import GrowingLayer, GrowthMethod


@dataclass(frozen=True)
class Static(GrowthMethod):
    """Train the connections that are there; the baseline of the growth methods."""

    moves: ClassVar[bool] = False
    uses_gradients: ClassVar[bool] = False
    scheduled: ClassVar[bool] = False
    name: ClassVar[str] = "static"
    summary: ClassVar[str] = "always-sparse layers whose connections stay: the baseline"
    paper: ClassVar[str] = ""
    step_cost: ClassVar[str] = "nothing"

    def fraction_at(self, step: int, total_steps: int) -> float:
        return 0.0

    def grow(self, layers: Sequence[GrowingLayer], count: int, step: int) -> list[Tensor]:
        return [layer.tried[:0] for layer in layers]
