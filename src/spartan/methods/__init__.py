"""The methods: one file each.

Those that mask weights are here, behind the contract of `spartan.methods.base`; those that grow
the connections of always-sparse layers are in `spartan.always_sparse`, behind that of `growth`.
"""

import dataclasses
from typing import Any

from spartan.always_sparse.dst_ee import DSTEE
from spartan.always_sparse.growth import Growth
from spartan.always_sparse.gse import GSE
from spartan.always_sparse.rigl import RigL
from spartan.always_sparse.set import SET
from spartan.always_sparse.static import Static
from spartan.errors import MethodError, did_you_mean
from spartan.methods.base import Method
from spartan.methods.constrained_l0 import ConstrainedL0
from spartan.methods.dpf import DPF
from spartan.methods.dual_averaging import DualAveraging
from spartan.methods.fcpts import FCPTS
from spartan.methods.fcpts_published import PublishedFCPTS
from spartan.methods.fixed import Fixed
from spartan.methods.magnitude import Magnitude
from spartan.methods.penalised_l0 import PenalisedL0
from spartan.methods.powerpropagation import Powerpropagation
from spartan.methods.spartan import Spartan

METHODS: dict[str, type[Method] | type[Growth]] = {
    cls.name: cls
    for cls in (
        *(Spartan, DualAveraging, Magnitude, DPF, Powerpropagation),
        *(ConstrainedL0, PenalisedL0, FCPTS, PublishedFCPTS, Fixed),
        *(GSE, SET, RigL, DSTEE, Static),
    )
}


def create(name: str, **settings: Any) -> Method | Growth:
    """Make a method by its name.

    Raises:
        MethodError: The name or a setting is unknown, or a setting is out of range.
    """
    if name not in METHODS:
        raise MethodError(f"Unknown method {name!r}; {did_you_mean(name, METHODS)}")
    cls = METHODS[name]
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            hint = did_you_mean(key, known) if known else "it has no settings."
            raise MethodError(f"The method {name!r} has no setting {key!r}; {hint}")
    return cls(**settings)


def list() -> tuple[type[Method] | type[Growth], ...]:
    """Return every method; each has a `name`, `summary`, `paper` and `step_cost` in one line."""
    return tuple(METHODS.values())


__all__ = [
    "DPF",
    "DSTEE",
    "FCPTS",
    "GSE",
    "METHODS",
    "SET",
    "ConstrainedL0",
    "DualAveraging",
    "Fixed",
    "Growth",
    "Magnitude",
    "Method",
    "PenalisedL0",
    "Powerpropagation",
    "PublishedFCPTS",
    "RigL",
    "Spartan",
    "Static",
    "create",
    "list",
]
