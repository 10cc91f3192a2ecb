"""Files that hold the options of a command: one writer and one reader for all commands."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import msgspec

from spartan.errors import ConfigError, FileError, did_you_mean

_COMMAND = "command"  # entry that says which command wrote a file; training writes none


class Options(Protocol):
    """The options of a command, a frozen dataclass."""

    command: ClassVar[str | None]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def out(self) -> str:
        """The folder to write."""


_O = TypeVar("_O", bound=Options)


def to_json(options: Options) -> str:
    """Return the text of a file that holds these options."""
    named = {} if options.command is None else {_COMMAND: options.command}
    return json.dumps({**named, **dataclasses.asdict(options)}, indent=2) + "\n"


def from_json(kind: type[_O], text: str, source: str) -> _O:
    """Read options; those that are not named get their defaults.

    Args:
        kind: The options of one command.
        text: What `to_json` wrote, or a person.
        source: Where it is from.

    Raises:
        ConfigError: It is not JSON, or an option is unknown, of another type or out of range.
    """
    values = _object(text, source)
    command = values.pop(_COMMAND, kind.command)
    if command != kind.command:
        wrote = f"'spartan {command}'" if command else "'spartan train'"
        raise ConfigError(f"{source} holds the options of {wrote}, another command.")
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{source}: unknown option {key!r}; {did_you_mean(key, known)}")
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$.")
        option = f"{place.rstrip('`')}: " if place else ""
        raise ConfigError(f"{source}: {option}{reason}") from error


def read_options(kind: type[_O], path: Path) -> _O:
    """Read a file of options.

    Raises:
        FileError: It cannot be read.
        ConfigError: Its content is wrong.
    """
    return from_json(kind, _read(path), str(path))


def command_of(path: Path) -> str | None:
    """Return the command that wrote a file of options, None for training.

    Raises:
        FileError: It cannot be read.
        ConfigError: It is not JSON.
    """
    command = _object(_read(path), str(path)).get(_COMMAND)
    return None if command is None else str(command)


def refuse_changes(saved: Options, given: Options, may_change: Collection[str]) -> None:
    """Raise if options differ that decide what is computed.

    Args:
        saved: Options of the run.
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


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"Cannot read the config {str(path)!r}: {error}.") from error


def _object(text: str, source: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold one JSON object of options.")
    return values
