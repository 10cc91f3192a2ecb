"""The exceptions of spartan, all subclasses of `SpartanError`.

Every message says what was given, what is possible and what to do about it. All errors derive
from `SpartanError`; the command line prints their message and exits with code 2.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable


def printable(text: str) -> str:
    r"""Return text without control characters, which a terminal would obey: as `\x1b` instead."""
    return "".join(
        c if c in "\n\t" or c.isprintable() or (not c.isascii() and ord(c) >= 0xA0)
        else repr(c)[1:-1]
        for c in text
    )  # fmt: skip


class SpartanError(Exception):
    """Base of every error this library raises on purpose."""


class BudgetError(SpartanError, ValueError):
    """The budget is not a valid request, or cannot be reached on this model."""


class PatternError(SpartanError, ValueError):
    """The pattern does not fit a parameter's shape."""


class PrunableError(SpartanError, ValueError):
    """The choice of prunable parameters is empty or names something unknown."""


class MethodError(SpartanError, ValueError):
    """A method's setting is out of range, or the method does not exist."""


class ScheduleError(SpartanError, ValueError):
    """The number of steps does not fit the schedule."""


class StateError(SpartanError, RuntimeError):
    """A saved state does not fit, or the sparsifier is in the wrong phase for the call."""


class NonFiniteError(SpartanError, ArithmeticError):
    """A weight or gradient is NaN or infinite."""


class ConfigError(SpartanError, ValueError):
    """An option of the command line or of a configuration file is wrong."""


class DataError(SpartanError, ValueError):
    """Training data is missing, unreadable or of an unexpected form."""


class CalibrationError(SpartanError, ValueError):
    """Calibration data are missing, too few, or not what the model takes."""


class AdapterError(SpartanError, ValueError):
    """An adapter's setting is out of range, or it does not fit the model."""


class WorldError(SpartanError, ValueError):
    """A world model's setting or data are out of range, or its target means nothing."""


class FileError(SpartanError, OSError):
    """A file cannot be read or written, or its content is damaged."""


class KernelError(SpartanError, RuntimeError):
    """The kernels that were asked for are not there."""


class DeployError(SpartanError, ValueError):
    """A model cannot be packed, accelerated, timed or exported as asked."""


class MissingExtraError(SpartanError, ImportError):
    """An optional dependency is needed and not installed."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence that offers `known` names for an unknown `name`."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(options[:12]) + (", …" if len(options) > 12 else "")
    return f"known: {shown}"


def some_of(names: Iterable[str]) -> str:
    """Return the first few names of a list, in quotes, for a sentence."""
    listed = list(names)
    others = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(map(repr, listed[:3])) + others


def renamed(old: str, new: str, stacklevel: int = 4) -> None:
    """Warn that something is used by the name it had before."""
    warnings.warn(f"{old} is called {new} now.", DeprecationWarning, stacklevel=stacklevel)
