"""`Registered` and `make`: base class of what is chosen by name, with its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from spartan.errors import MethodError, did_you_mean


class Registered:
    """Base of all methods. Subclasses are frozen dataclasses; their fields are the settings."""

    scheduled: ClassVar[bool] = True  # whether it needs to know the length of the run
    name: ClassVar[str]
    summary: ClassVar[str]  # when to choose it, in a line
    paper: ClassVar[str]
    step_cost: ClassVar[str]  # what it adds to a training step

    def settings(self) -> dict[str, Any]:
        """Return the method's name and settings as plain values."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        return {"name": self.name, **plain}


_M = TypeVar("_M", bound=Registered)


def make(known: Mapping[str, type[_M]], name: str, settings: Mapping[str, Any]) -> _M:
    """Make a method by its name.

    Args:
        known: The methods there are, by name.
        name: Which.
        settings: Its settings that are not the default.

    Raises:
        MethodError: The name or a setting is unknown, or a setting is out of range.
    """
    if name not in known:
        raise MethodError(f"Unknown method {name!r}; {did_you_mean(name, known)}")
    cls = known[name]
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in settings:
        if key not in fields:
            hint = did_you_mean(key, fields) if fields else "it has no settings."
            raise MethodError(f"The method {name!r} has no setting {key!r}; {hint}")
    return cls(**settings)
