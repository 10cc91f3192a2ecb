"""`AnnealedMasking`: schedule of methods that warm up to their budget, and fix masks at last."""

from __future__ import annotations

from spartan.methods.masking.contract import MaskingMethod
from spartan.schedules import Curve, check_annealing, check_fraction, check_order, progress


class AnnealedMasking(MaskingMethod):
    """Base of the methods whose density falls in a warm-up, and whose masks then follow θ.

    Attributes:
        warmup: Fraction of the run over which the density falls to the budget.
        finetune: Last fraction of the run, with fixed masks.
        annealing: Curve of the fall.
    """

    warmup: float
    finetune: float
    annealing: Curve

    def check_schedule(self) -> None:
        """Raise `MethodError` if the schedule is out of range; called when a method is made."""
        check_fraction("warmup", self.warmup)
        check_fraction("finetune", self.finetune)
        check_order(self.warmup, self.finetune)
        check_annealing(self.annealing)

    def moves_masks(self, step: int, total_steps: int) -> bool:
        return step <= self._last_update(total_steps)

    def progress(self, step: int, total_steps: int) -> float:
        if step >= total_steps:
            return 1.0
        return progress(step, int(self.warmup * total_steps), self.annealing)

    def _last_update(self, total_steps: int) -> int:
        return total_steps - int(self.finetune * total_steps)
