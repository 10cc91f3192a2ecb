"""Fixed masks: weights that are zero at the start stay zero, the others train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from spartan.errors import BudgetError
from spartan.methods.masking.contract import MaskingMethod, mask_gradients
from spartan.methods.masking.groups import BudgetGroup
from spartan.methods.masking.masked_weight import MaskedWeight


@dataclass(frozen=True)
class Fixed(MaskingMethod):
    """Hold the zeros that the weights have when the sparsifier is made; `spartan.freeze` uses it.

    A unit is kept if any of its weights is not zero. The budget must be the one that is there, or
    larger.

    Raises:
        BudgetError: More is not zero than the budget allows.
    """

    scheduled: ClassVar[bool] = False
    finds_masks: ClassVar[bool] = False
    name: ClassVar[str] = "fixed"
    summary: ClassVar[str] = "fine-tune an already sparse model without losing its zeros"
    paper: ClassVar[str] = ""
    step_cost: ClassVar[str] = "one pass over the weights"

    def moves_masks(self, step: int, total_steps: int) -> bool:
        return step == 0

    def progress(self, step: int, total_steps: int) -> float:
        return 1.0

    def select(self, groups: Sequence[BudgetGroup], step: int, total_steps: int) -> None:
        if step > 0:
            return
        for group in groups:
            for weight in group.weights:
                weight.mask = weight.magnitudes() > 0
            if group.kept > group.budget.kept:
                raise BudgetError(
                    f"'fixed' holds the zeros that are there, but of {group.weights[0].name!r} and "
                    f"its group {group.kept:,.10g} units are not zero, and the budget is "
                    f"{group.budget.kept:,.10g}: prune the model first, or use spartan.freeze."
                )

    def pull_back(
        self, group: BudgetGroup, weights: Sequence[MaskedWeight], step: int, total_steps: int
    ) -> None:
        mask_gradients(weights, [weight.mask for weight in weights])
