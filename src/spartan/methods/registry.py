"""`create`, `available`: every method that a sparsifier takes, by name."""

from __future__ import annotations

import inspect
from typing import Any

from spartan.errors import MethodError
from spartan.methods.growth.contract import GrowthMethod
from spartan.methods.growth.dst_ee import DSTEE
from spartan.methods.growth.gse import GSE
from spartan.methods.growth.rigl import RigL
from spartan.methods.growth.set import SET
from spartan.methods.growth.static import Static
from spartan.methods.masking.constrained_l0 import ConstrainedL0
from spartan.methods.masking.contract import MaskingMethod
from spartan.methods.masking.dpf import DPF
from spartan.methods.masking.dual_averaging import DualAveraging
from spartan.methods.masking.fcpts import FCPTS
from spartan.methods.masking.fcpts_published import PublishedFCPTS
from spartan.methods.masking.fixed import Fixed
from spartan.methods.masking.magnitude import Magnitude
from spartan.methods.masking.penalised_l0 import PenalisedL0
from spartan.methods.masking.powerpropagation import Powerpropagation
from spartan.methods.masking.spartan import Spartan
from spartan.registry import make

AnyMethod = MaskingMethod | GrowthMethod

METHODS: dict[str, type[MaskingMethod] | type[GrowthMethod]] = {
    cls.name: cls
    for cls in (
        *(Spartan, DualAveraging, Magnitude, DPF, Powerpropagation),
        *(ConstrainedL0, PenalisedL0, FCPTS, PublishedFCPTS, Fixed),
        *(GSE, SET, RigL, DSTEE, Static),
    )
}


def create(name: str, **settings: Any) -> AnyMethod:
    """Make a method by its name.

    Raises:
        MethodError: The name or a setting is unknown, or a setting is out of range.
    """
    return make(METHODS, name, settings)


def available() -> tuple[type[MaskingMethod] | type[GrowthMethod], ...]:
    """Return every method; each has a `name`, `summary`, `paper` and `step_cost` in one line."""
    return tuple(METHODS.values())


def as_method(method: AnyMethod | str) -> AnyMethod:
    """Return a method as it is, or make it by its name with default settings.

    Raises:
        MethodError: It is neither a method nor the name of one.
    """
    if isinstance(method, str):
        return create(method)
    if isinstance(method, MaskingMethod | GrowthMethod):
        return method
    if inspect.isclass(method):
        raise MethodError(
            f"method={method.__name__} is a class: write method={method.__name__}(), with its "
            "settings if they are not the default."
        )
    raise MethodError(
        f"method={method!r} is no method: write method=spartan.methods.Spartan(), or a name such "
        "as method='spartan'; spartan.methods.available() lists them."
    )
