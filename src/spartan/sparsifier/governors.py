"""Which run governs a parameter: one at a time, the one made last."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Protocol

from spartan.weights.prunable import Prunable


class Governor(Protocol):
    """A run that can be ended. It keeps its parameters alive."""

    @property
    def attached(self) -> bool:
        """Whether it goes on."""

    def abandon(self) -> None:
        """End, and leave the model as it is."""


# By the id of the parameter, which is that of another one only once the run is gone. There are no
# weak references to parameters: torch does not exchange tensors that have some.
_governors: dict[int, weakref.ref[Governor]] = {}


def govern(weights: Sequence[Prunable], run: Governor) -> None:
    """Let a run govern weights from here on; one that did before ends, with a warning."""
    for weight in weights:
        reference = _governors.get(id(weight.parameter))
        before = None if reference is None else reference()
        if before is not None and before is not run and before.attached:
            before.abandon()
            warnings.warn(
                f"{weight.name!r} is governed by a sparsifier that was made earlier and not "
                "finalized: that one ends here.",
                stacklevel=4,
            )
        _governors[id(weight.parameter)] = weakref.ref(run)


def release(weights: Sequence[Prunable], run: Governor) -> None:
    """Let a run that ends govern its weights no longer."""
    for weight in weights:
        reference = _governors.get(id(weight.parameter))
        if reference is not None and reference() in (run, None):
            del _governors[id(weight.parameter)]
