"""`Transitions`: states, next states, and the true influence graph from a simulator."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from spartan.errors import WorldError


@dataclass(frozen=True)
class Transitions:
    """M steps of a world with up to N objects.

    Attributes:
        states: Features of each object, `[M, N, F]`.
        following: The features that change, one step later, `[M, N, D]`.
        mask: Which objects are there, boolean `[M, N]`.
        environment: Which intervention was on, integers `[M]`.
        edges: Object j (column) influenced object i (row), boolean `[M, N, N]`, diagonal False;
            None of worlds that do not tell.
        targets: The intervention acted on object i, boolean `[M, N]`; or None.
        events: Something happened that training data should have more of (a contact), boolean
            `[M]`; or None.
        borderline: The edge from j to i hangs on a distance that is within a tenth of its
            threshold, boolean `[M, N, N]`; or None.
    """

    states: Tensor
    following: Tensor
    mask: Tensor
    environment: Tensor
    edges: Tensor | None = None
    targets: Tensor | None = None
    events: Tensor | None = None
    borderline: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.states)
        if count == 0 or self.states.dim() != 3:
            raise WorldError(
                f"states of shape {tuple(self.states.shape)} given; [M, N, F] with M ≥ 1 needed."
            )
        for name, dims in (("following", 2), ("mask", 2), ("environment", 1)):
            shape = getattr(self, name).shape[:dims]
            if shape != self.states.shape[:dims]:
                raise WorldError(
                    f"{name} begins with {tuple(shape)}, states with "
                    f"{tuple(self.states.shape[:dims])}."
                )
        if self.mask.dtype != torch.bool or not bool(self.mask.any()):
            raise WorldError("mask must be boolean, and some object must be there.")
        if self.environment.dtype != torch.int64 or bool((self.environment < 0).any()):
            raise WorldError("environment must hold numbers from 0 on, int64.")
        if not bool(torch.isfinite(self.states).all() & torch.isfinite(self.following).all()):
            raise WorldError("States hold NaN or infinity.")

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: Tensor | slice) -> Transitions:
        return Transitions(**{name: value[index] for name, value in self._tensors().items()})

    def to(self, device: torch.device) -> Transitions:
        """Return them on a device."""
        return Transitions(**{name: value.to(device) for name, value in self._tensors().items()})

    def balanced(self, generator: torch.Generator) -> Transitions:
        """Return as many transitions, drawn so that events are half of them.

        Mechanisms that seldom fire are learned far sooner from those. Without events, or with
        nothing else, the transitions are returned as they are.
        """
        if self.events is None or bool(self.events.all()) or not bool(self.events.any()):
            return self
        parts = []
        for rows, share in ((self.events, len(self) // 2), (~self.events, (len(self) + 1) // 2)):
            found = rows.nonzero().squeeze(1)
            drawn = torch.randint(
                len(found), (share,), generator=generator, device=generator.device
            )
            parts.append(found[drawn.to(rows.device)])
        return self[torch.cat(parts)]

    def _tensors(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}
