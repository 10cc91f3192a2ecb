"""Simulators whose graphs are checked by changing one object at a time."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from spartan.errors import WorldError
from spartan.world_model.environments import (
    ENVIRONMENTS,
    BouncingBalls,
    CreateLite,
    Environment,
    make_environment,
)

NAMES = sorted(ENVIRONMENTS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def worlds(environment: Environment, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    states, mask = environment.start(count, generator(seed))
    return states, mask, torch.arange(count) % len(environment.interventions)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_determinism(name: str) -> None:
    environment = make_environment(name)
    n, f = environment.objects, len(environment.features)
    states, mask, choice = worlds(environment, 50)
    steps = [environment.step(states, mask, choice, generator(1)) for _ in range(2)]
    assert states.shape == (50, n, f)
    assert torch.equal(steps[0].states, steps[1].states)
    step = steps[0]
    assert step.states.shape == states.shape
    assert torch.equal(
        step.states[..., environment.changing :], states[..., environment.changing :]
    )
    assert step.edges.shape == (50, n, n)
    assert step.targets.shape == (50, n)
    assert step.edges.dtype == step.targets.dtype == step.events.dtype == torch.bool
    assert not bool(step.edges.diagonal(dim1=1, dim2=2).any())
    there = mask.unsqueeze(1) & mask.unsqueeze(2)
    assert not bool((step.edges & ~there).any() | (step.targets & ~mask).any())
    assert bool(step.states.isfinite().all())
    assert not bool(step.targets[choice == 0].any())


@pytest.mark.parametrize("name", NAMES)
def test_only_senders_of_edges_have_influence(name: str) -> None:
    """An object changes another's next state only where an edge is, before or after the change."""
    environment = make_environment(name)
    states, mask, choice = worlds(environment, 3000)
    other, _, _ = worlds(environment, 3000, seed=5)
    before = environment.step(states, mask, choice, generator(1))
    used, reported = 0, 0
    for j in range(environment.objects):
        moved = states.clone()
        kind = environment.changing if name == "create" else 0
        # Only what may change with time, and what an object is stays: types have their places.
        moved[:, j, : kind or None] = other[:, j, : kind or None]
        if name == "balls":  # they may not overlap
            moved[:, j] = states[:, j]
            moved[:, j, 2:4] = other[:, j, 2:4]
        moved[~mask] = states[~mask]
        after = environment.step(moved, mask, choice, generator(1))
        changed = ((after.states - before.states).abs() > 1e-4).any(-1)
        changed[:, j] = False
        edges = before.edges | after.edges
        edge = edges[:, :, j]
        if name == "balls":  # one may be missed, because the one that would have met it was hit
            edge = edge | (edges & edge.unsqueeze(1)).any(-1)
        assert not bool((changed & ~edge).any()), j
        used += int((changed & edge).sum())
        reported += int(edge.sum())
    # Edges are used: where a mechanism fired, another sender nearly always gives another state.
    assert used > 0.5 * reported > 100


@pytest.mark.parametrize("name", NAMES)
def test_interventions_change_only_their_targets(name: str) -> None:
    environment = make_environment(name)
    states, mask, _ = worlds(environment, 3000)
    none = environment.step(states, mask, torch.zeros(3000, dtype=torch.long), generator(1))
    for number in range(1, len(environment.interventions)):
        choice = torch.full((3000,), number)
        step = environment.step(states, mask, choice, generator(1))
        changed = ((step.states - none.states).abs() > 1e-5).any(-1)
        readers = ((none.edges | step.edges) & step.targets.unsqueeze(1)).any(-1)
        assert not bool((changed & ~step.targets & ~readers).any()), number
        assert bool((changed & step.targets).any()), environment.interventions[number]


def test_balls_keep_energy_and_momentum() -> None:
    environment = BouncingBalls()
    states, mask = environment.start(2000, generator())
    none = torch.zeros(2000, dtype=torch.long)
    mass = states[..., 5:6] + 1

    def energy(s: Tensor) -> Tensor:
        return (mass * s[..., 2:4].double().square()).sum((1, 2))

    def momentum(s: Tensor) -> Tensor:
        return (mass * s[..., 2:4].double()).sum(1)

    start, contacts = states, 0
    for _ in range(10):
        before = states
        step = environment.step(states, mask, none, generator())
        states = step.states
        # Where no wall was near, momentum is kept as well.
        far = (before[..., :2].abs() < 0.55).all(-1).all(-1)
        contacts += int((far & step.events).sum())
        difference = (momentum(states) - momentum(before))[far]
        assert float(difference.abs().max() if len(difference) else 0.0) < 1e-5
    assert contacts > 0
    torch.testing.assert_close(energy(states), energy(start), rtol=0, atol=1e-5)
    radius = (states[..., 4] + 0.85) / 10
    assert bool((states[..., :2].abs() <= 1 - 2 * radius.unsqueeze(-1) + 1e-5).all())


def test_balls_that_meet_head_on_swap_velocities() -> None:
    environment = BouncingBalls()
    states = torch.zeros(1, 5, 6)
    states[0, :, 0] = torch.tensor([-0.15, 0.15, -0.8, 0.8, 0.0])
    states[0, :, 1] = torch.tensor([0.0, 0.0, 0.8, 0.8, -0.8])
    states[0, 0, 2], states[0, 1, 2] = 1.0, -0.5
    mask = torch.ones(1, 5, dtype=torch.bool)
    step = environment.step(states, mask, torch.tensor([0]), generator())
    assert step.states[0, :2, 2].tolist() == pytest.approx([-0.5, 1.0], abs=1e-5)
    assert step.edges.nonzero().tolist() == [[0, 0, 1], [0, 1, 0]]


def test_create_has_four_to_nine_objects() -> None:
    for balls in ((2, 4), (5, 6)):
        environment = CreateLite(balls)
        _, mask = environment.start(5000, generator())
        count = mask.sum(1)
        assert (int(count.min()), int(count.max())) == (max(4, balls[0]), 9)
        found = mask[:, 5:].sum(1)
        assert (int(found.min()), int(found.max())) == balls
    with pytest.raises(WorldError, match="from 2 to 6"):
        CreateLite((1, 3))


def test_trajectories_are_consecutive() -> None:
    environment = make_environment("particles")
    data = environment.collect(6, 4, [0, 2, 5], generator())
    assert data.environment.tolist() == [e for _ in range(2) for e in (0, 2, 5) for _ in range(4)]
    for first in range(0, 24, 4):
        for t in range(first, first + 3):
            assert torch.equal(data.following[t], data.states[t + 1, :, : environment.changing])


def test_balanced_draws_half_events() -> None:
    data = make_environment("pong").collect(4000, 1, [0], generator())
    assert data.events is not None
    assert 0.02 < float(data.events.float().mean()) < 0.4
    balanced = data.balanced(generator())
    assert balanced.events is not None
    assert int(balanced.events.sum()) == 2000
    assert len(balanced) == len(data)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(WorldError, match="did you mean 'particles'"):
        make_environment("particle")


@pytest.mark.parametrize("name", NAMES)
def test_gymnasium(name: str) -> None:
    gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    from gymnasium.utils.env_checker import check_env

    from spartan.world_model.gym_world import GymWorld

    world = GymWorld(make_environment(name), horizon=5, render_mode="rgb_array")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # features have no bounds
        check_env(world, skip_render_check=True)
    observation, info = world.reset(seed=3)
    again, _ = world.reset(seed=3)
    assert np.array_equal(observation, again)
    for step in range(5):
        observation, reward, terminated, truncated, info = world.step(1)
        assert world.observation_space.contains(observation)
        assert (reward, terminated, truncated) == (0.0, False, step == 4)
        assert info["edges"].shape == (world.world.objects,) * 2
    picture = world.render()
    assert picture is not None
    assert picture.shape[2] == 3
    with pytest.raises(gymnasium.error.InvalidAction, match="a number from 0 to"):
        world.step(99)


def test_borderline_pairs_are_those_within_a_tenth_of_the_threshold() -> None:
    particles = make_environment("particles")
    states, mask, choice = worlds(particles, 2000)
    step = particles.step(states, mask, choice, generator())
    x = (states[..., :2] + 1) / 2
    distance = (x.unsqueeze(2) - x.unsqueeze(1)).norm(dim=-1)
    assert step.borderline is not None
    assert torch.equal(step.borderline, (distance > 0.27) & (distance < 0.33))

    create = CreateLite()
    _, mask, choice = worlds(create, 1)
    apart = torch.linspace(-20, -10, create.objects).view(1, -1, 1)
    ball = 5
    # Half widths, in sides of the square: of ladder, cannon and wall, and where balls touch.
    for other, threshold in ((0, 0.08), (2, 0.1), (3, 0.16 + 0.065), (6, 0.13)):
        for part, expected in ((0.0, 0), (0.88, 0), (0.92, 1), (1.08, 1), (1.12, 0)):
            states, _ = create.start(1, generator())
            states[..., :2] = apart
            states[0, other, :2] = 0.5
            states[0, ball, :2] = torch.tensor([0.5 + 2 * part * threshold, 0.5])
            found = create.step(states, mask, choice, generator()).borderline
            assert found is not None
            assert int(found[0, ball, other]) == expected
            assert int(found.sum()) == expected * (2 if other == 6 else 1)
    for name in ("pong", "balls"):
        world = make_environment(name)
        states, mask, choice = worlds(world, 10)
        assert world.step(states, mask, choice, generator()).borderline is None
        assert world.collect(2, 3, [0, 1], generator()).borderline is None
    assert particles.collect(2, 3, [0, 1], generator()).borderline is not None
