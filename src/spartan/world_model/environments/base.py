"""`Environment`: base class of simulated worlds, and collection of transitions from one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spartan.world_model.transitions import Transitions


@dataclass(frozen=True)
class Step:
    """What one step of B worlds did.

    Attributes:
        states: Next features of every object, `[B, N, F]`.
        edges: Boolean `[B, N, N]`: the mechanism by which object j (column) acts on object i (row)
            fired in this step. The diagonal is False.
        targets: Boolean `[B, N]`: the intervention changed a mechanism that object i went through.
        events: Boolean `[B]`: something happened that training data should have more of.
        borderline: Boolean `[B, N, N]`: the pair's distance that decides on the edge is within a
            tenth of its threshold; None of worlds that do not tell.
    """

    states: Tensor
    edges: Tensor
    targets: Tensor
    events: Tensor
    borderline: Tensor | None = None


@dataclass(frozen=True)
class Shape:
    """How an object is drawn, in the unit square.

    Attributes:
        label: What is written on it.
        x: Of the centre, from the left.
        y: Of the centre, from the bottom.
        half_width: Or radius.
        half_height: None of a disc.
        color: As `#rrggbb`.
    """

    label: str
    x: float
    y: float
    half_width: float
    half_height: float | None = None
    color: str = "#9db4c8"


class Environment(ABC):
    """Many worlds of one kind at once, whose state is what a model sees.

    All flags of a step are computed by the mechanisms themselves, in the same call.

    Attributes:
        name: What the command line calls it.
        objects: N, the most objects of a world.
        features: Names of an object's features; F of them.
        changing: The first how many change with time, D.
        interventions: Names; the first is "none".
        seen: The first how many interventions are for training; the rest is for adaptation.
        episode: Steps of a trajectory in training data.
    """

    name: ClassVar[str]
    objects: int
    features: ClassVar[tuple[str, ...]]
    changing: ClassVar[int]
    interventions: ClassVar[tuple[str, ...]]
    seen: ClassVar[int]
    episode: ClassVar[int]

    @abstractmethod
    def start(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw worlds: states `[count, N, F]` and which objects are there `[count, N]`."""

    @abstractmethod
    def step(
        self, states: Tensor, mask: Tensor, intervention: Tensor, generator: torch.Generator
    ) -> Step:
        """Simulate one step.

        Args:
            states: `[B, N, F]`.
            mask: Boolean `[B, N]`.
            intervention: Integers `[B]`, numbers in `interventions`.
            generator: Of random forces.
        """

    @abstractmethod
    def shapes(self, state: Tensor, mask: Tensor) -> list[Shape | None]:
        """Return how to draw one world, `[N, F]`; None for objects that are not there."""

    def collect(
        self,
        trajectories: int,
        length: int,
        interventions: Sequence[int],
        generator: torch.Generator,
    ) -> Transitions:
        """Simulate trajectories, an equal number with each intervention.

        Returns:
            `trajectories × length` transitions; those of one trajectory are consecutive.
        """
        states, mask = self.start(trajectories, generator)
        choice = torch.tensor(list(interventions))[torch.arange(trajectories) % len(interventions)]
        before, after, steps = [], [], []
        for _ in range(length):
            step = self.step(states, mask, choice, generator)
            before.append(states)
            after.append(step.states[..., : self.changing])
            steps.append(step)
            states = step.states

        def in_order(parts: list[Tensor]) -> Tensor:
            return torch.stack(parts, 1).flatten(0, 1)

        borderline = [step.borderline for step in steps if step.borderline is not None]
        return Transitions(
            states=in_order(before),
            following=in_order(after),
            mask=mask.repeat_interleave(length, 0),
            environment=choice.repeat_interleave(length),
            edges=in_order([step.edges for step in steps]),
            targets=in_order([step.targets for step in steps]),
            events=in_order([step.events for step in steps]),
            borderline=in_order(borderline) if borderline else None,
        )
