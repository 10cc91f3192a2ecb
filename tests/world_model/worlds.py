"""A world that is learned in seconds: a follower that hears its leader only when behind it."""

from __future__ import annotations

import torch

from spartan.world_model import (
    Learner,
    TransitionConfig,
    TransitionModel,
    Transitions,
    WorldModel,
)

CONFIG = TransitionConfig(
    features=3, changing=1, environments=2, width=24, hidden=48, frequencies=4
)


def follower_world(count: int, seed: int = 0, environments: int = 2) -> Transitions:
    """Two objects: value, place, kind.

    Where the second's place is behind the first's by more than 0.2, its value moves by 2 in the
    direction of the first's sign. Environment 1, in a quarter of states, adds 1 to the first's.
    """
    generator = torch.Generator().manual_seed(seed)
    states = 2 * torch.rand(count, 2, 3, generator=generator) - 1
    states[..., 2] = torch.tensor([-1.0, 1.0])
    environment = (torch.randint(4, (count,), generator=generator) - 2).clamp(0, environments - 1)
    hears = states[:, 0, 1] - states[:, 1, 1] > 0.2
    following = states[..., :1].clone()
    following[:, 0, 0] += environment
    following[:, 1, 0] += 2 * hears * states[:, 0, 0].sign()
    edges = torch.zeros(count, 2, 2, dtype=torch.bool)
    edges[:, 1, 0] = hears
    targets = torch.zeros(count, 2, dtype=torch.bool)
    targets[:, 0] = environment == 1
    mask = torch.ones(count, 2, dtype=torch.bool)
    return Transitions(states, following, mask, environment, edges, targets)


def make_model(data: Transitions, **changes: object) -> TransitionModel:
    """Return an untrained model of it."""
    from dataclasses import replace

    torch.manual_seed(0)
    model = TransitionModel(replace(CONFIG, **changes))  # type: ignore[arg-type]
    model.fit_scale(data)
    return model


def train(learner: Learner) -> WorldModel:
    """Take all steps, and return the result."""
    while not learner.done:
        learner.advance()
        if learner.checks_now:
            learner.check()
    learner.finish()
    return learner.model
