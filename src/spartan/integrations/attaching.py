"""`attach` makes the sparsifier of a run that a trainer plans or resumes; `Numbers` is its log."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from spartan.sparsifier.arguments import as_optimizers
from spartan.sparsifier.carrier import steps_brought
from spartan.sparsifier.sparsifier import Sparsifier


def attach(model: nn.Module, optimizer: Any, total_steps: int, **settings: Any) -> Sparsifier:
    """Make a sparsifier; it goes on with the run that the optimizer was loaded with, if any.

    Args:
        model: The model.
        optimizer: What `Sparsifier` takes.
        total_steps: Steps that the trainer plans.
        settings: All other arguments of `Sparsifier`.

    Raises:
        SpartanError: As `Sparsifier` does.
    """
    begun = steps_brought(as_optimizers(optimizer))
    if begun is None or begun == total_steps:
        return Sparsifier(model, optimizer, total_steps=total_steps, **settings)
    sparsifier = Sparsifier(model, optimizer, total_steps=begun, **settings)
    done = sparsifier.step
    if total_steps <= done:
        told = "no further step is planned, and finalize() ends it as it is"
    elif sparsifier.moves:
        sparsifier.extend(total_steps)
        told = f"the rest of the schedule is planned for {total_steps:,}"
    else:
        told = "the masks are fixed already, and stay; further steps train what is kept"
    warnings.warn(
        f"The run that goes on after step {done:,} was begun for {begun:,} steps: {told}.",
        stacklevel=2,
    )
    return sparsifier


class Numbers:
    """What a trainer logs of a sparsifier: density, kept weights, churn, the method's numbers.

    Args:
        sparsifier: The sparsifier.
    """

    def __init__(self, sparsifier: Sparsifier) -> None:
        self._sparsifier, self._selected = sparsifier, sparsifier.selected()

    def take(self) -> dict[str, float]:
        """Return the numbers of now; churn is the share of units that changed since the last."""
        kept = sum(row.kept for row in self._sparsifier.layers())
        churn = self._sparsifier.churn(self._selected)
        self._selected = self._sparsifier.selected()
        found = {"kept": float(kept), "churn": churn, **self._sparsifier.monitor()}
        return {f"spartan/{name}": value for name, value in found.items()}
