"""State that L0 methods keep for each weight and each group: gate parameters, multipliers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.methods.masking.state import GroupState, WeightState, unsaved


@dataclass(frozen=True)
class Sample:
    """Gates as drawn for the training passes of one step.

    Attributes:
        gate: z of each unit.
        slope: dz / d log α.
    """

    gate: Tensor
    slope: Tensor


@dataclass
class Gates(WeightState):
    """The gates of one weight; tensors have one entry per unit.

    Attributes:
        log_alpha: log α, while gates are trained.
        mean: Adam's first moment of its gradient.
        square: Adam's second moment.
        fixed: The gates once they are fixed, 0 where pruned.
        shut: Whether it was said that all of them close.
        sample: What training passes of the current step computed with.
        pulled: The loss's gradient of log α in the current step, once it is known.
    """

    log_alpha: Tensor | None = None
    mean: Tensor | None = None
    square: Tensor | None = None
    fixed: Tensor | None = None
    shut: bool = False
    sample: Sample | None = unsaved()
    pulled: Tensor | None = unsaved()

    @property
    def log_alphas(self) -> Tensor:
        """Log α, of gates that are not fixed yet."""
        assert self.log_alpha is not None
        return self.log_alpha


@dataclass
class GateGroup(GroupState):
    """The gates that share a budget.

    Attributes:
        expected: Their expected density.
        start: What that was at first.
        unit: Of λ: a running mean of the loss's own pull at the gates.
        multiplier: λ, in units of the loss.
        open: Density of the gates that were mostly open when they were fixed.
        heard: Whether it was looked at if the loss depends on the gates.
        dual: λ in its own unit, of constrained methods.
        memory: What their rule remembers of the violation.
    """

    expected: float | None = None
    start: float | None = None
    unit: float | None = None
    multiplier: float | None = None
    open: float | None = None
    heard: bool = False
    dual: float = 0.0
    memory: float | None = None


def gates_of(weight: MaskedWeight) -> Gates:
    """Return the gates of a weight."""
    return weight.state_as(Gates)
