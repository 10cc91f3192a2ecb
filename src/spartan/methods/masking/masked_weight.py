"""`MaskedWeight`: one prunable weight during a run: θ, its mask, its gradient, its state."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from torch import Tensor

from spartan.kernels import Dual, kept
from spartan.kernels.memory import flat, unflat
from spartan.kernels.scores import wide
from spartan.kernels.units import Grid, pool_magnitudes, pool_products
from spartan.methods.masking.state import WeightState
from spartan.weights.patterns import Pattern, Unstructured
from spartan.weights.prunable import Prunable

_S = TypeVar("_S", bound=WeightState)


@dataclass(frozen=True)
class PendingMask:
    """A mask that was selected and takes effect when w is next written, in the same pass.

    Attributes:
        threshold: Score above which entries are kept.
        tie_end: Of the entries at the threshold, those before this flat position are kept.
        dual: The dual variable of the soft mask; None without one.
    """

    threshold: float
    tie_end: int
    dual: Dual | None


@dataclass(eq=False)
class MaskedWeight:
    """One prunable weight during a run.

    What is valid when (see also docs/architecture.md):

        between steps   the parameter holds w; `latent` holds θ; no mask is pending
        inside a step   the parameter holds θ, which the optimizer moves (`stepping`); `latent` is
                        behind; after the step a mask may be pending until w is written
        training pass   of methods that sample: the parameter holds a random w (`sampled`)

    Attributes:
        prunable: The parameter and its name.
        pattern: How it divides into units.
        cost: What one unit takes from the group's budget.
        divisor: What the pooled |θ| of a unit is divided by to be its score: the mean |θ| of the
            unit, per relative cost of a weight.
        floor: Units that it keeps at least in a competition with other weights.
        latent: θ, dense, in the shape and dtype of the parameter.
        stored_mask: The mask as last written; see `mask`.
        dual: Dual variable of the soft mask, for methods that have one and do not store the mask.
        state: What the method keeps of the weight, saved with the run.
        active: Whether the parameter had a gradient in the current step.
        newborn: Whether it began as nothing but zeros, as new heads and adapters do, and has not
            competed yet: it learns, dense, until the budget is reached.
        stepping: Whether the parameter holds θ: inside a step.
        sampled: Whether the parameter holds the w of a training pass, of methods that sample.
        loss_scale: What the gradient of the current step is multiplied by: 1, but under a
            GradScaler that leaves it to a fused optimizer to divide.
        pending: What was selected and is not written yet.
        counted: Version of the mask and number of its kept units, once that was asked for.
    """

    prunable: Prunable
    pattern: Pattern
    cost: float
    divisor: float
    floor: int
    latent: Tensor
    stored_mask: Tensor
    dual: Dual | None = None
    state: WeightState = field(default_factory=WeightState)
    active: bool = True
    newborn: bool = False
    stepping: bool = False
    sampled: bool = False
    loss_scale: float = 1.0
    pending: PendingMask | None = None
    counted: tuple[int, int] | None = None

    @property
    def mask(self) -> Tensor:
        """Kept units, boolean, in the pattern's unit shape; overwritten in place as masks move."""
        self.apply_pending()
        return self.stored_mask

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        self.stored_mask, self.pending, self.counted = mask, None, None

    def apply_pending(self) -> None:
        """Let a pending mask take effect now, instead of when w is next written."""
        if self.pending is not None:
            scores = wide(flat(self.theta)).abs() * self.scale
            mask = kept(scores, self.pending.threshold, self.pending.tie_end)
            self.stored_mask = unflat(mask, self.theta)
            self.note_applied(self.pending.dual)

    def note_applied(self, dual: Dual | None) -> None:
        """Take note that the pending mask, with the soft mask of `dual`, is in effect."""
        self.pending, self.dual, self.counted = None, dual, None

    def state_as(self, kind: type[_S]) -> _S:
        """Return the method's state of this weight, typed."""
        assert isinstance(self.state, kind)
        return self.state

    @property
    def name(self) -> str:
        """Name of the parameter."""
        return self.prunable.name

    @property
    def parameter(self) -> Tensor:
        """The parameter, as a plain tensor on the same memory."""
        return self.prunable.parameter.detach()

    @property
    def theta(self) -> Tensor:
        """θ, newest: the parameter inside a step, else the latent weight."""
        return self.parameter if self.stepping else self.latent

    @property
    def elementwise(self) -> bool:
        """Whether every single weight is a unit, in the shape of the parameter."""
        return isinstance(self.pattern, Unstructured)

    @cached_property
    def grid(self) -> Grid:
        """How the weight divides into units."""
        return self.pattern.grid(self.prunable)

    @property
    def units(self) -> int:
        """Number of units."""
        return self.stored_mask.numel()

    @property
    def scale(self) -> float:
        """What the pooled |θ| of a unit is multiplied by to be its score."""
        return 1.0 / self.divisor

    @property
    def kept(self) -> int:
        """Number of kept units."""
        mask = self.mask
        if self.counted is None or self.counted[0] != mask._version:
            self.counted = mask._version, int(mask.count_nonzero())
        return self.counted[1]

    @property
    def grad(self) -> Tensor | None:
        """Gradient of the parameter: of w before `pull_back`, of θ after it."""
        return self.prunable.parameter.grad

    @property
    def required_grad(self) -> Tensor:
        """The gradient, where there must be one."""
        assert self.grad is not None
        return self.grad

    def magnitudes(self) -> Tensor:
        """Return the sum of |θ| over each unit, in float32 or float64."""
        if self.elementwise:
            return wide(self.theta).abs()
        return pool_magnitudes(self.theta, self.grid, self.stored_mask.shape)

    def scores(self) -> Tensor:
        """Return the score of each unit, in float32 or float64."""
        pooled = self.magnitudes()
        return pooled if self.scale == 1.0 else pooled * self.scale

    def spread(self, units: Tensor) -> Tensor:
        """Repeat unit values over the weight's shape."""
        return self.pattern.spread(units, self.prunable)

    def pool_product(self, x: Tensor) -> Tensor:
        """Sum x · θ over each unit, in float32 or float64."""
        if self.elementwise:
            return wide(x) * wide(self.latent)
        return pool_products(x, self.latent, self.grid, self.stored_mask.shape)
