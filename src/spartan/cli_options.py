"""What commands that resume runs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from spartan.errors import ConfigError


def refuse_changes(saved: Any, given: Any, may_change: Collection[str]) -> None:
    """Raise if options differ that decide what is computed.

    Args:
        saved: Options of the run, a dataclass.
        given: Options now.
        may_change: Names of those that say where and how it is computed.

    Raises:
        ConfigError: One differs.
    """
    for field in dataclasses.fields(saved):
        before, now = getattr(saved, field.name), getattr(given, field.name)
        if before != now and field.name not in may_change:
            raise ConfigError(
                f"--{field.name.replace('_', '-')} was {before!r} when the run was begun and "
                f"cannot become {now!r} on resuming; start a new run with --out."
            )
