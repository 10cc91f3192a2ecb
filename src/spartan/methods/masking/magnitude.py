r"""Magnitude pruning, gradual or at once (Zhu and Gupta, 2017).

    h_t = top k_t of |θ|,   w = θ · h_t,   dL/dθ = G · h_t

Gradual: with sparsity s_f = 1 - density and x the way from `begin` to `end`, the sparsity at step t
is s_t = s_f (1 - (1 - x)^3), fast while much is redundant, slow towards the end. At once: k_t jumps
to the budget at `begin`. Pruned weights get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from spartan.errors import MethodError, did_you_mean
from spartan.methods.masking.contract import MaskingMethod, mask_gradients
from spartan.methods.masking.groups import BudgetGroup, competitions_of, keep_largest
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.schedules import check_fraction, progress


@dataclass(frozen=True)
class Magnitude(MaskingMethod):
    """Keep the largest weights; prune gradually on a cubic schedule, or all at once.

    Attributes:
        schedule: `"gradual"` or `"one-shot"`.
        begin: Fraction of the run before which nothing is pruned. With `"one-shot"`, 0 prunes when
            the sparsifier is made.
        end: Fraction of the run at which the gradual schedule reaches the budget.
        finetune: Last fraction of the run, with fixed masks. One-shot masks never move again.

    Raises:
        MethodError: A setting is out of range.

    Source: Zhu and Gupta, "To prune, or not to prune", 2017, section 3.
    """

    schedule: Literal["gradual", "one-shot"] = "gradual"
    begin: float = 0.0
    end: float = 0.5
    finetune: float = 0.2

    checks_weights: ClassVar[bool] = True
    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = "the classic baseline; gradual or one-shot"
    paper: ClassVar[str] = "Zhu and Gupta, 2017"
    step_cost: ClassVar[str] = "two to three passes over the weights, native on the CPU"

    def __post_init__(self) -> None:
        known = ("gradual", "one-shot")
        if self.schedule not in known:
            raise MethodError(f"schedule={self.schedule!r}; {did_you_mean(self.schedule, known)}")
        for field in ("begin", "end", "finetune"):
            check_fraction(field, getattr(self, field))
        if self.schedule == "gradual" and not self.begin <= self.end <= 1.0 - self.finetune:
            raise MethodError(
                f"begin={self.begin}, end={self.end}, finetune={self.finetune}: pruning must end "
                "after it begins and before the fine-tuning: begin <= end <= 1 - finetune."
            )

    def moves_masks(self, step: int, total_steps: int) -> bool:
        begin = int(self.begin * total_steps)
        if self.schedule == "one-shot":
            return step == begin
        return begin <= step <= total_steps - int(self.finetune * total_steps)

    def progress(self, step: int, total_steps: int) -> float:
        begin, end = int(self.begin * total_steps), int(self.end * total_steps)
        if step >= total_steps:
            return 1.0
        if self.schedule == "one-shot":
            return float(step >= begin)
        return progress(step, end, "cubic", begin)

    def select(self, groups: Sequence[BudgetGroup], step: int, total_steps: int) -> None:
        keep_largest(competitions_of(groups, self.progress(step, total_steps)))

    def pull_back(
        self, group: BudgetGroup, weights: Sequence[MaskedWeight], step: int, total_steps: int
    ) -> None:
        mask_gradients(weights, [weight.mask for weight in weights])
