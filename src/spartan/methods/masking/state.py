"""Typed state of a method during a run: small dataclasses that are saved and restored.

Fields hold None, booleans, numbers, tensors or a `Forecast`; those made with `unsaved()` live
within a step only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from spartan.errors import StateError

# A bracket reaches at least and at most this far from its middle, relative to the number: narrower,
# noise would leave it; wider, too many scores would lie inside for the search to gain anything.
_NARROWEST, _WIDEST = 2e-4, 5e-3


@dataclass
class Forecast:
    """A number that changes little from step to step: a guess saves passes, never changes results.

    It moves about as far as it moved the last time.

    Attributes:
        value: The newest value, if one is known.
        drift: How far it had moved.
    """

    value: float | None = None
    drift: float | None = None

    def remember(self, value: float) -> None:
        """Take in the newest value; infinite ones say nothing about the next."""
        if not math.isfinite(value):
            self.value = self.drift = None
            return
        if self.value is not None:
            self.drift = value - self.value
        self.value = value

    @property
    def expected(self) -> float | None:
        """The expected next value, or None if nothing is known."""
        return None if self.value is None else self.value + (self.drift or 0.0)

    @property
    def bracket(self) -> tuple[float, float]:
        """An interval that should hold the next value; (0, 0) if nothing is known."""
        middle = self.expected
        if middle is None:
            return 0.0, 0.0
        size = abs(middle)
        # Without a known drift, as far as a bracket goes.
        reach = math.inf if self.drift is None else abs(self.drift)
        reach = min(max(reach, _NARROWEST * size), _WIDEST * size)
        return middle - reach, middle + reach


@dataclass
class WeightState:
    """What a method keeps of one weight; methods that keep something derive from it."""


@dataclass
class GroupState:
    """What a method keeps of one group of weights; methods that keep more derive from it.

    Attributes:
        threshold: Cutoff score of the last selection.
        settled: Whether masks were selected at the target density.
    """

    threshold: Forecast = field(default_factory=Forecast)
    settled: bool = False


State = WeightState | GroupState
_S = TypeVar("_S", bound=State)


def unsaved() -> Any:
    """Return a field that is None to begin with, and not saved."""
    return field(default=None, metadata={"saved": False})


def saved(state: State) -> dict[str, Any]:
    """Return what is to be saved of a state, as plain values and tensors."""
    values: dict[str, Any] = {}
    for one in _saved_fields(type(state)):
        value = getattr(state, one.name)
        if isinstance(value, Tensor):
            value = value.clone()
        elif isinstance(value, Forecast):
            value = [value.value, value.drift]
        values[one.name] = value
    return values


def restored(kind: type[_S], values: Mapping[str, Any], device: torch.device) -> _S:
    """Return the state that `saved` told of.

    Raises:
        StateError: It is of another kind.
    """
    state = kind()
    known = {one.name for one in _saved_fields(kind)}
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in known:
            raise StateError(f"The state holds {name!r}, which this method does not keep.")
        if not _fits(value, hints[name]):
            raise StateError(f"The state is damaged: it holds {value!r} as {name!r}.")
        if hints[name] is Forecast:
            value = Forecast(*value)
        elif isinstance(value, Tensor):
            value = value.to(device, copy=True)
        setattr(state, name, value)
    return state


def _fits(value: object, hint: Any) -> bool:
    """Whether a value that was read has the type of a field."""
    if hint is Forecast:
        pair = value if isinstance(value, list | tuple) else ()
        return len(pair) == 2 and all(_fits(number, float | None) for number in pair)
    kinds = get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, *((int,) if float in kinds else ())))


def _saved_fields(kind: type[Any]) -> list[dataclasses.Field[Any]]:
    return [one for one in dataclasses.fields(kind) if one.metadata.get("saved", True)]
