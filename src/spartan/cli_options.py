"""What commands that resume runs share."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from spartan.errors import ConfigError


def paths_named_by(words: Sequence[str], *options: str) -> list[Path | None]:
    """Return the paths that options of `train` name, ahead of the real parser.

    Args:
        words: The words of the command line, its command first.
        options: As `--resume`.

    Returns:
        A path or None for each; None for all where the real parser will explain what is wrong.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in options:
        first.add_argument(option, type=Path, dest=option)
    try:
        known, _ = first.parse_known_args(words if words[:1] == ["train"] else [])
    except argparse.ArgumentError:
        return [None for _ in options]
    return [getattr(known, option) for option in options]


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
