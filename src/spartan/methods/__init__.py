"""The methods: one file each, behind the contract of `spartan.methods.base`."""

from typing import Any

from spartan.errors import MethodError, did_you_mean
from spartan.methods.base import Method
from spartan.methods.dual_averaging import DualAveraging
from spartan.methods.fixed import Fixed
from spartan.methods.magnitude import Magnitude
from spartan.methods.spartan import Spartan

METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (Spartan, DualAveraging, Magnitude, Fixed)
}


def create(name: str, **settings: Any) -> Method:
    """Make a method by its name.

    Raises:
        MethodError: The name or a setting is unknown, or a setting is out of range.
    """
    if name not in METHODS:
        raise MethodError(f"Unknown method {name!r}; {did_you_mean(name, METHODS)}")
    cls = METHODS[name]
    known = list(cls.__dataclass_fields__)  # type: ignore[attr-defined]
    for key in settings:
        if key not in known:
            hint = did_you_mean(key, known) if known else "it has no settings."
            raise MethodError(f"The method {name!r} has no setting {key!r}; {hint}")
    return cls(**settings)


__all__ = ["METHODS", "DualAveraging", "Fixed", "Magnitude", "Method", "Spartan", "create"]
