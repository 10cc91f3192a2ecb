"""Guesses for numbers that change little from step to step: they save passes, never change results.

A number moves about as far as it moved the last time; both are kept in the numbers of a group.
"""

from __future__ import annotations

import math

# A bracket reaches at least and at most this far from its middle, relative to the number.
_NARROWEST, _WIDEST = 2e-4, 5e-3


def remember(numbers: dict[str, float], key: str, value: float) -> None:
    """Take in the newest value; infinite ones say nothing about the next."""
    if not math.isfinite(value):
        numbers.pop(key, None)
        numbers.pop(_drift(key), None)
        return
    if key in numbers:
        numbers[_drift(key)] = value - numbers[key]
    numbers[key] = value


def forecast(numbers: dict[str, float], key: str) -> float | None:
    """Return the expected next value, or None if none is known."""
    if key not in numbers:
        return None
    return numbers[key] + numbers.get(_drift(key), 0.0)


def bracket(numbers: dict[str, float], key: str) -> tuple[float, float]:
    """Return an interval that should hold the next value; (0, 0) if nothing is known."""
    middle = forecast(numbers, key)
    if middle is None:
        return 0.0, 0.0
    size = abs(middle)
    # Without a known drift, as far as a bracket goes.
    reach = abs(numbers.get(_drift(key), math.inf))
    reach = min(max(reach, _NARROWEST * size), _WIDEST * size)
    return middle - reach, middle + reach


def _drift(key: str) -> str:
    return f"{key} drift"
