"""Which run governs a parameter: one at a time, the one made last."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Protocol

from torch.utils.weak import WeakIdKeyDictionary

from spartan.weights.prunable import Prunable


class Governor(Protocol):
    """A run that can be ended."""

    @property
    def attached(self) -> bool:
        """Whether it goes on."""

    def abandon(self) -> None:
        """End, and leave the model as it is."""


_governors = WeakIdKeyDictionary()  # from parameters to weak references to runs


def govern(weights: Sequence[Prunable], run: Governor) -> None:
    """Let a run govern weights from here on; one that did before ends, with a warning."""
    for weight in weights:
        reference = _governors.get(weight.parameter)
        before = None if reference is None else reference()
        if before is not None and before is not run and before.attached:
            before.abandon()
            warnings.warn(
                f"{weight.name!r} is governed by a sparsifier that was made earlier and not "
                "finalized: that one ends here.",
                stacklevel=4,
            )
        _governors[weight.parameter] = weakref.ref(run)
