r"""Dual averaging, or Top-KAST (Jayakumar et al., NeurIPS 2020).

The forward pass uses the top |θ| only; a larger set receives gradients:

    A = top k of |θ|,  B = top k_B of |θ|,  A ⊆ B
    w = θ · 1_A                      forward
    dL/dθ = G · 1_B                  straight-through; 1 everywhere for a dense backward pass

so pruned weights keep accumulating gradients and enter A when they have grown. The penalty that
Top-KAST puts on θ is the weight decay of the user's optimizer.

Nothing but that decay, `dead_outputs` and the floors of the budget holds pruned weights back: at
high sparsity and with norms between the layers the method falls behind (`benchmarks/league.py`, 2 %
of a residual network); allocate per layer then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spartan.errors import MethodError
from spartan.methods.masking.annealed import AnnealedMasking
from spartan.methods.masking.contract import mask_gradients
from spartan.methods.masking.dead_outputs import hold_dead_outputs
from spartan.methods.masking.groups import BudgetGroup, Competition, competitions_of, keep_largest
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.methods.masking.state import WeightState
from spartan.schedules import Curve


@dataclass
class BackwardMask(WeightState):
    """Which units of a weight receive gradients, boolean; None for all of them."""

    backward: Tensor | None = None


@dataclass(frozen=True)
class DualAveraging(AnnealedMasking):
    """Hard top-k forward, straight-through gradients to a larger set.

    Attributes:
        backward_density: Fraction of the units that receive gradients; 1.0 is dense.
        warmup: Fraction of the run over which the density falls from 1 to the target.
        finetune: Last fraction of the run: the masks are fixed, and only kept weights train.
        annealing: Shape of the density schedule.

    Raises:
        MethodError: A setting is out of range.

    Source: Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020; with
    `backward_density=1` the dual averaging baseline of Tai et al., NeurIPS 2022.
    """

    backward_density: float = 1.0
    warmup: float = 0.2
    finetune: float = 0.2
    annealing: Curve = "linear"

    checks_weights: ClassVar[bool] = True
    weight_state: ClassVar[type[WeightState]] = BackwardMask
    name: ClassVar[str] = "dual-averaging"
    summary: ClassVar[str] = "Top-KAST: moderate sparsity, networks without norms; no soft masks"
    paper: ClassVar[str] = "Jayakumar et al., NeurIPS 2020"
    step_cost: ClassVar[str] = "two to three passes over the weights, native on the CPU"

    def __post_init__(self) -> None:
        if not 0 < self.backward_density <= 1:
            raise MethodError(f"backward_density={self.backward_density} must lie in (0, 1].")
        self.check_schedule()

    def select(self, groups: Sequence[BudgetGroup], step: int, total_steps: int) -> None:
        competitions = competitions_of(groups, self.progress(step, total_steps))
        keep_largest(competitions)
        if self.backward_density < 1.0:
            for competition in competitions:
                self._select_backward(competition)

    def _select_backward(self, competition: Competition) -> None:
        wider = max(competition.budget, competition.group.budget.of(self.backward_density))
        masks = competition.largest(wider)
        for weight, mask in zip(competition.weights, masks, strict=True):
            weight.state_as(BackwardMask).backward = mask

    def pull_back(
        self, group: BudgetGroup, weights: Sequence[MaskedWeight], step: int, total_steps: int
    ) -> None:
        if step >= self._last_update(total_steps):
            mask_gradients(weights, [weight.mask for weight in weights])
            return
        hold_dead_outputs(weights)
        if self.backward_density < 1.0:
            known = [
                (w, b) for w in weights if (b := w.state_as(BackwardMask).backward) is not None
            ]
            mask_gradients([weight for weight, _ in known], [mask for _, mask in known])

    def lacks(self, weight: MaskedWeight, step: int, total_steps: int) -> str | None:
        narrow = self.backward_density < 1.0 and step < self._last_update(total_steps)
        missing = narrow and weight.state_as(BackwardMask).backward is None and not weight.newborn
        return "backward" if missing else None
