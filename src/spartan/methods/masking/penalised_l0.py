r"""Penalised L0 (Louizos et al., ICLR 2018): the baseline that constrained L0 replaces.

    minimise over θ, log α   L(θ, log α) + λ g(log α),    λ fixed

with gates on units and g their expected density (see `gated`). Which density a λ leads to depends
on network, data and learning rates, and is known only after training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from spartan.errors import MethodError
from spartan.methods.masking.gated import Gated
from spartan.methods.masking.groups import BudgetGroup


@dataclass(frozen=True)
class PenalisedL0(Gated):
    """Hard-concrete gates under a fixed penalty; the budget is met at the end only.

    Attributes:
        penalty: λ: what the density of 1 adds to the loss.
        gate_lr, finetune, keep_one, seed: See `Gated`.

    Raises:
        MethodError: A setting is out of range.

    Source: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization",
    ICLR 2018.
    """

    penalty: float = 0.1

    name: ClassVar[str] = "penalised-l0"
    summary: ClassVar[str] = "a baseline: gates under a fixed penalty, whose density is a surprise"
    paper: ClassVar[str] = "Louizos et al., ICLR 2018"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.penalty) and self.penalty >= 0):
            raise MethodError(f"penalty={self.penalty} must be 0 or more.")

    def multiplier(self, group: BudgetGroup, step: int, total_steps: int) -> float:
        return self.penalty
