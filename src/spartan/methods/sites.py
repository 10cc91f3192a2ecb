"""One prunable weight during a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from spartan.kernels import Dual, kept
from spartan.kernels.memory import flat, unflat
from spartan.kernels.scores import wide
from spartan.kernels.units import Grid, pool_magnitudes, pool_products
from spartan.patterns import Pattern, Unstructured
from spartan.prunable import Prunable


@dataclass(frozen=True)
class Choice:
    """What was selected for a site and takes effect when its weight is next written.

    Attributes:
        threshold: Score above which entries are kept.
        stop: Of the entries at the threshold, those before this flat position are kept.
        dual: The dual variable of the soft mask; None without one.
    """

    threshold: float
    stop: int
    dual: Dual | None


@dataclass(eq=False)
class Site:
    """One prunable weight during a run.

    Attributes:
        weight: The parameter and its name.
        pattern: How it divides into units.
        cost: What one unit takes from the group's budget.
        divisor: What the pooled |θ| of a unit is divided by to be its score: the mean |θ| of the
            unit, per relative cost of a weight.
        latent: θ, dense, in the shape and dtype of the parameter.
        stored_mask: The mask as last written; see `mask`.
        dual: Dual variable of the soft mask, for methods that have one and do not store the mask.
        tensors: What the method keeps per weight (soft masks, …), saved with the state.
        active: Whether the parameter had a gradient in the current step.
        stepping: Whether the parameter holds θ: inside a step.
        sampled: Whether the parameter holds the w of a training pass, of methods that sample.
        loss_scale: What the gradient of the current step is multiplied by: 1, but under a
            GradScaler that leaves it to a fused optimizer to divide.
        scratch: What the method keeps within a step; not saved.
        choice: What was selected and is not written yet.
        counted: Version of the mask and number of its kept units, once that was asked for.
    """

    weight: Prunable
    pattern: Pattern
    cost: float
    divisor: float
    latent: Tensor
    stored_mask: Tensor
    dual: Dual | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    active: bool = True
    stepping: bool = False
    sampled: bool = False
    loss_scale: float = 1.0
    scratch: dict[str, Tensor] = field(default_factory=dict)
    choice: Choice | None = None
    counted: tuple[int, int] | None = None

    @property
    def mask(self) -> Tensor:
        """Kept units, boolean, in the pattern's unit shape; overwritten in place as masks move."""
        self.resolve()
        return self.stored_mask

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        self.stored_mask, self.choice, self.counted = mask, None, None

    def resolve(self) -> None:
        """Let a choice take effect now, instead of when the weight is next written."""
        if self.choice is not None:
            scores = wide(flat(self.theta)).abs() * self.scale
            mask = kept(scores, self.choice.threshold, self.choice.stop)
            self.stored_mask = unflat(mask, self.theta)
            self.settle(self.choice.dual)

    def settle(self, dual: Dual | None) -> None:
        """Take note that the choice, with the soft mask of `dual`, is in effect."""
        self.choice, self.dual, self.counted = None, dual, None

    @property
    def name(self) -> str:
        """Name of the parameter."""
        return self.weight.name

    @property
    def parameter(self) -> Tensor:
        """The parameter, as a plain tensor on the same memory."""
        return self.weight.parameter.detach()

    @property
    def theta(self) -> Tensor:
        """θ, newest: the parameter inside a step, else the latent weight."""
        return self.parameter if self.stepping else self.latent

    @property
    def elementwise(self) -> bool:
        """Whether every weight is a unit, in the shape of the parameter."""
        return isinstance(self.pattern, Unstructured)

    @cached_property
    def grid(self) -> Grid:
        """How the weight divides into units."""
        return self.pattern.grid(self.weight)

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
        return self.weight.parameter.grad

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

    def soft_mask(self) -> Tensor:
        """Return the soft mask of each unit, at the latent weights it was solved for."""
        if self.dual is not None:
            return self.dual.mask(self.scores())
        return self.tensors["soft"]

    def spread(self, units: Tensor) -> Tensor:
        """Repeat unit values over the weight's shape."""
        return self.pattern.spread(units, self.weight)

    def pool_product(self, x: Tensor) -> Tensor:
        """Sum x · θ over each unit, in float32 or float64."""
        if self.elementwise:
            return wide(x) * wide(self.latent)
        return pool_products(x, self.latent, self.grid, self.stored_mask.shape)
