r"""Dynamic pruning with feedback, DPF (Lin et al., ICLR 2020).

    w_t = θ_t · h_t,    h_t = top k_t of |θ_t|, chosen anew every p steps
    θ_{t+1} = θ_t - η G(w_t)

The gradient is taken at the pruned weights and given to all of θ: what pruning took away comes back
as an error that later steps can correct, and pruned weights return when they have grown. The
sparsity rises as s_f (1 - (1 - t/n)^3); from step n on the masks stay. Weight decay acts on θ;
without it pruned weights never fade.

The method converges to a neighbourhood whose size goes with |θ - w|^2 / |θ|^2: the number
`pruning_error` of `Sparsifier.monitor()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from spartan.errors import MethodError
from spartan.methods.masking.contract import MaskingMethod
from spartan.methods.masking.dead_outputs import hold_dead_outputs
from spartan.methods.masking.groups import BudgetGroup, competitions_of, keep_largest
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.schedules import check_fraction, progress


@dataclass(frozen=True)
class DPF(MaskingMethod):
    """Hard top-k forward, straight-through gradients, masks chosen every few steps.

    Attributes:
        period: p, steps between two choices of the masks.
        end: Fraction of the run at which the budget is reached and the masks stay.

    Raises:
        MethodError: A setting is out of range.

    Source: Lin, Stich, Barba, Dmitriev, Jaggi, "Dynamic Model Pruning with Feedback", ICLR 2020.
    """

    period: int = 16
    end: float = 0.75

    checks_weights: ClassVar[bool] = True
    name: ClassVar[str] = "dpf"
    summary: ClassVar[str] = "gradual pruning whose mistakes come back; moderate sparsity"
    paper: ClassVar[str] = "Lin et al., ICLR 2020"
    step_cost: ClassVar[str] = "one pass over the weights; a top-k every 16 steps"

    def __post_init__(self) -> None:
        if not (isinstance(self.period, int) and self.period >= 1):
            raise MethodError(f"period={self.period} must be a number of steps, at least 1.")
        check_fraction("end", self.end)

    def moves_masks(self, step: int, total_steps: int) -> bool:
        end = int(self.end * total_steps)
        return step == end or (step < end and step % self.period == 0)

    def progress(self, step: int, total_steps: int) -> float:
        end = int(self.end * total_steps)
        if step >= end:
            return 1.0
        return progress(step - step % self.period, end, "cubic")

    def select(self, groups: Sequence[BudgetGroup], step: int, total_steps: int) -> None:
        keep_largest(competitions_of(groups, self.progress(step, total_steps)))

    def pull_back(
        self, group: BudgetGroup, weights: Sequence[MaskedWeight], step: int, total_steps: int
    ) -> None:
        """Give the gradient of w to all of θ."""
        hold_dead_outputs(weights)

    def monitor(self, group: BudgetGroup) -> dict[str, float]:
        squares = torch.zeros(2, dtype=torch.float64)
        for weight in group.weights:
            square = weight.latent.double().square()
            pruned = torch.where(weight.spread(weight.mask), 0.0, square)
            squares += torch.stack((pruned.sum(), square.sum())).cpu()
        lost, whole = squares.tolist()
        return {"pruning_error": lost / whole if whole else 0.0}
