"""All methods, one file each: `masking` for dense weights, `growth` for always-sparse ones."""

from typing import Any

from spartan.errors import renamed
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
from spartan.methods.registry import METHODS, available, create

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
    "GrowthMethod",
    "Magnitude",
    "MaskingMethod",
    "PenalisedL0",
    "Powerpropagation",
    "PublishedFCPTS",
    "RigL",
    "Spartan",
    "Static",
    "available",
    "create",
]

_RENAMED = {"Method": "MaskingMethod", "Growth": "GrowthMethod", "list": "available"}


def __getattr__(name: str) -> Any:
    """Return what is asked for by the name it had in version 0.1."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    renamed(f"spartan.methods.{name}", f"spartan.methods.{_RENAMED[name]}", stacklevel=3)
    return globals()[_RENAMED[name]]
