"""Schedules of density and sharpness over a run: linear, cosine, cubic."""

from __future__ import annotations

import math
from typing import Literal

from spartan.errors import MethodError

Curve = Literal["linear", "cosine", "cubic"]


def progress(step: int, end: int, shape: Curve = "linear", begin: int = 0) -> float:
    """Return how far a quantity has moved from its start to its end value.

    With x = (step - begin) / (end - begin), clipped to [0, 1]:

    * linear: x
    * cosine: (1 - cos(pi x)) / 2
    * cubic: 1 - (1 - x)^3, the gradual pruning schedule of Zhu and Gupta (2017, section 3)

    Args:
        step: Optimizer steps done so far.
        end: Step at which 1.0 is reached; `end <= begin` means a jump at `begin`.
        shape: Curve between the two.
        begin: Step up to which the value is 0.0.

    Returns:
        A number in [0, 1]; exactly 1.0 from step `end` on.
    """
    if step >= max(end, begin):
        return 1.0
    if step <= begin:
        return 0.0
    x = (step - begin) / (end - begin)
    if shape == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * x))
    if shape == "cubic":
        return 1.0 - (1.0 - x) ** 3
    return x


def interpolate(start: float, stop: float, fraction: float) -> float:
    """Return the value `fraction` of the way from `start` to `stop`."""
    return start + (stop - start) * fraction


def check_fraction(name: str, value: float) -> None:
    """Raise `MethodError` unless `value` is a fraction of the run, in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise MethodError(f"{name}={value!r} must be a fraction of the run, between 0 and 1.")


def check_order(warmup: float, finetune: float) -> None:
    """Raise `MethodError` unless the warm-up ends before the masks are fixed."""
    if warmup + finetune > 1.0:
        raise MethodError(
            f"warmup={warmup} and finetune={finetune} overlap: the budget must be reached before "
            "the masks are fixed, so they may add up to 1 at most."
        )


def check_annealing(value: str) -> None:
    """Raise `MethodError` unless `value` names a shape that anneals two quantities alike."""
    if value not in ("linear", "cosine", "cubic"):
        raise MethodError(f"annealing={value!r} is unknown; known: linear, cosine, cubic.")
