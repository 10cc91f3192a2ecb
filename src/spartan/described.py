"""What can be chosen by name: it says when to choose it, and lists its settings."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar


class Described:
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
