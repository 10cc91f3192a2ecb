"""What a compression is asked to do, checked and filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spartan.errors import MethodError, did_you_mean
from spartan.methods.base import Method
from spartan.methods.fcpts import FCPTS
from spartan.methods.fcpts_published import PublishedFCPTS
from spartan.methods.fixed import Fixed
from spartan.methods.gated import Gated
from spartan.patterns import NM, Pattern
from spartan.post_training.allocation import Allocation, check_allocation
from spartan.post_training.base import LayerMethod
from spartan.post_training.distillation import Distillation
from spartan.post_training.registry import BEST, METHODS, create

Reconstruct = Literal["auto", "layer", "network"] | None


@dataclass(frozen=True)
class Request:
    """What is to be done.

    Attributes:
        method: Finds what stays; None for the best for the time there is.
        allocation: Spreads the budget over layers.
        reconstruct: What follows.
        how: How the network is distilled, where it is.
        minutes: Time the whole may take, instead of a number of steps.
    """

    method: LayerMethod | Method | None
    allocation: Allocation
    reconstruct: str | None
    how: Distillation
    minutes: float | None

    @property
    def joint(self) -> bool:
        """Whether the method finds the rates of layers itself."""
        learns = isinstance(self.method, FCPTS | PublishedFCPTS)
        return learns and self.allocation == "learned"


def make_request(
    method: str | LayerMethod | Method,
    allocation: Allocation | None,
    reconstruct: str | None,
    how: Distillation | None,
    minutes: float | None,
    pattern: Pattern | None,
) -> Request:
    """Fill in what was left open, and refuse what does not fit together."""
    if minutes is not None and not minutes > 0:
        raise MethodError(f"minutes={minutes} must be positive.")
    if method == BEST:
        if allocation is not None or reconstruct != "auto":
            raise MethodError(f"method={BEST!r} chooses allocation and reconstruction itself.")
        return Request(None, "learned", "network", how or Distillation(), minutes)
    if isinstance(method, str):
        method = create(method)
    elif not isinstance(method, LayerMethod | Method):
        raise MethodError(f"method={method!r} is not a method; {did_you_mean('', METHODS)}")
    if isinstance(method, Gated | Fixed):
        raise MethodError(
            f"{method.name!r} cannot be used in a distillation: gates need their random passes, "
            "and 'fixed' prunes nothing."
        )
    trains = isinstance(method, Method)
    if allocation is None:
        allocation = "learned" if isinstance(method, FCPTS | PublishedFCPTS) else "erk"
    check_allocation(allocation)
    if isinstance(pattern, NM):
        allocation = "uniform"  # n of every m leaves nothing to spread
    elif isinstance(method, PublishedFCPTS) and allocation != "learned":
        raise MethodError(f"{method.name!r} learns its rates; for others, use method='fcpts'.")
    if reconstruct == "auto":
        reconstruct = "network" if trains else None
    if reconstruct not in (None, "layer", "network"):
        raise MethodError(f"reconstruct={reconstruct!r} must be None, 'layer' or 'network'.")
    return Request(method, allocation, reconstruct, how or Distillation(), minutes)
