"""`CompressionPlan`: method, allocation and reconstruction of a compression, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from spartan.errors import MethodError, did_you_mean
from spartan.methods.masking.contract import MaskingMethod
from spartan.methods.masking.fcpts import FCPTS
from spartan.methods.masking.fcpts_published import PublishedFCPTS
from spartan.post_training.allocation import Allocation, check_allocation
from spartan.post_training.alps import ALPS
from spartan.post_training.distillation import Distillation
from spartan.post_training.obs import OBS
from spartan.post_training.solver import LayerSolver, MagnitudeSolver
from spartan.post_training.sparsegpt import SparseGPT
from spartan.post_training.wanda import Wanda
from spartan.registry import Registered, make
from spartan.weights.patterns import Pattern

METHODS: dict[str, type[LayerSolver] | type[MaskingMethod]] = {
    cls.name: cls for cls in (FCPTS, PublishedFCPTS, ALPS, OBS, SparseGPT, Wanda, MagnitudeSolver)
}
BEST = "best"
# Steps of distillation from which on it is worth it. What `benchmarks/post_training.py` measured:
# from 50 steps on, which take as long as a sweep of SparseGPT with a refit, FCPTS is ahead of that
# (74.7 and 74.4 % at 80 % sparsity, 64.4 and 63.7 % at 90 %), and gains with every further step.
_FEWEST = 50

Reconstruct = Literal["auto", "layer", "network"] | None


@dataclass(frozen=True)
class CompressionPlan:
    """What a compression will do.

    Attributes:
        method: Finds what stays; None for the best for the time there is.
        allocation: Spreads the budget over layers.
        reconstruct: What follows.
        how: How the network is distilled, where it is.
        minutes: Time the whole may take, instead of a number of steps.
    """

    method: LayerSolver | MaskingMethod | None
    allocation: Allocation
    reconstruct: str | None
    how: Distillation
    minutes: float | None

    @property
    def joint(self) -> bool:
        """Whether the method finds the rates of layers itself."""
        learns = isinstance(self.method, MaskingMethod) and self.method.learns_rates
        return learns and self.allocation == "learned"


def combination(steps: int) -> tuple[LayerSolver | MaskingMethod, str, str]:
    """Return what suits so many steps of distillation: method, allocation and reconstruction."""
    if steps >= _FEWEST:
        return FCPTS(), "learned", "network"
    return SparseGPT(), "erk", "layer"


def create(name: str, **settings: Any) -> LayerSolver | MaskingMethod:
    """Make a method of compression by its name.

    Raises:
        MethodError: There is no such method or setting.
    """
    if name not in METHODS:
        raise MethodError(f"Unknown method {name!r}; {did_you_mean(name, [*METHODS, BEST])}")
    made: Registered = make(METHODS, name, settings)
    assert isinstance(made, LayerSolver | MaskingMethod)
    return made


def make_plan(
    method: str | LayerSolver | MaskingMethod,
    allocation: Allocation | None,
    reconstruct: str | None,
    how: Distillation | None,
    minutes: float | None,
    pattern: Pattern | None,
) -> CompressionPlan:
    """Fill in what was left open, and refuse what does not fit together."""
    if minutes is not None and not minutes > 0:
        raise MethodError(f"minutes={minutes} must be positive.")
    if method == BEST:
        if allocation is not None or reconstruct != "auto":
            raise MethodError(f"method={BEST!r} chooses allocation and reconstruction itself.")
        return CompressionPlan(None, "learned", "network", how or Distillation(), minutes)
    if isinstance(method, str):
        method = create(method)
    elif not isinstance(method, LayerSolver | MaskingMethod):
        raise MethodError(f"method={method!r} is not a method; {did_you_mean('', METHODS)}")
    trains = isinstance(method, MaskingMethod)
    if isinstance(method, MaskingMethod) and (not method.finds_masks or method.samples(0, 1)):
        raise MethodError(
            f"{method.name!r} cannot be used in a distillation: gates need their random passes, "
            "and 'fixed' prunes nothing."
        )
    learns_rates = isinstance(method, MaskingMethod) and method.learns_rates
    if allocation is None:
        allocation = "learned" if learns_rates else "erk"
    check_allocation(allocation)
    if pattern is not None and pattern.fixed_ratio is not None:
        allocation = "uniform"  # n of every m leaves nothing to spread
    elif isinstance(method, MaskingMethod) and method.rates_only and allocation != "learned":
        raise MethodError(f"{method.name!r} learns its rates; for others, use method='fcpts'.")
    if reconstruct == "auto":
        reconstruct = "network" if trains else None
    if reconstruct not in (None, "layer", "network"):
        raise MethodError(f"reconstruct={reconstruct!r} must be None, 'layer' or 'network'.")
    return CompressionPlan(method, allocation, reconstruct, how or Distillation(), minutes)
