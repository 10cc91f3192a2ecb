r"""Discs that bounce off walls and off each other without loss.

Within a step the motion is exact: the earliest contact of each world is found, the world is moved
there, the two velocities change by the impulse

    J = 2 m_i m_j / (m_i + m_j) (v_i - v_j) · n          n: unit normal at the contact

and so on until the step is over. Momentum is conserved by every contact, energy by the whole step,
and contacts lie on the surfaces, so that positions depend continuously on radii. A ball that was
hit by one that had been hit before has read of both.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from spartan.world_model.environments.base import Environment, Shape, Step

_UNIT = 0.07  # of velocities
_GRAVITY, _DRAG = 0.02, 0.7
_PAIRS = torch.combinations(torch.arange(5), 2)


class BouncingBalls(Environment):
    """Five discs of different mass and radius in the unit square."""

    name: ClassVar[str] = "balls"
    objects: int = 5
    features: ClassVar[tuple[str, ...]] = ("x", "y", "v_x", "v_y", "radius", "mass")
    changing: ClassVar[int] = 4
    interventions: ClassVar[tuple[str, ...]] = (
        *("none", "gravity", "drag on the left", "gravity + drag on the left"),
    )
    seen: ClassVar[int] = 3
    episode: ClassVar[int] = 6

    def start(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        n = self.objects
        u = torch.rand(count, n, 4, generator=generator)
        radius, mass = 0.06 + 0.05 * u[..., 0], 0.5 + u[..., 1]
        states = torch.zeros(count, n, len(self.features))
        states[..., 2:4] = 2 * u[..., 2:] - 1
        states[..., 4], states[..., 5] = 10 * radius - 0.85, mass - 1
        again = torch.arange(count)
        while len(again):  # until no two overlap
            r = radius[again].unsqueeze(-1)
            x = r + (1 - 2 * r) * torch.rand(len(again), n, 2, generator=generator)
            states[again, :, :2] = 2 * x - 1
            gap = (x[:, _PAIRS[:, 0]] - x[:, _PAIRS[:, 1]]).norm(dim=-1)
            free = gap > (r[:, _PAIRS[:, 0]] + r[:, _PAIRS[:, 1]]).squeeze(-1)
            again = again[~free.all(1)]
        return states, torch.ones(count, n, dtype=torch.bool)

    def step(
        self, states: Tensor, mask: Tensor, intervention: Tensor, generator: torch.Generator
    ) -> Step:
        x, v = (states[..., :2] + 1) / 2, states[..., 2:4] * _UNIT
        x, v, read = _move(x, v, radius_of(states), states[..., 5] + 1)
        falls, drags = (intervention == 1) | (intervention == 3), intervention >= 2
        slowed = drags.unsqueeze(1) & (x[..., 0] < 0.5)
        v = torch.where(slowed.unsqueeze(-1), _DRAG * v, v)
        v[..., 1] -= _GRAVITY * falls.unsqueeze(1)
        following = torch.cat((2 * x - 1, v / _UNIT, states[..., 4:]), -1)
        edges = read & ~torch.eye(self.objects, dtype=torch.bool)
        return Step(following, edges, slowed | falls.unsqueeze(1), edges.flatten(1).any(1))

    def shapes(self, state: Tensor, mask: Tensor) -> list[Shape | None]:
        radii = radius_of(state).tolist()
        return [
            Shape(str(i), (row[0] + 1) / 2, (row[1] + 1) / 2, radius)
            for i, (row, radius) in enumerate(zip(state.tolist(), radii, strict=True))
        ]


def radius_of(states: Tensor) -> Tensor:
    """Return the radii of discs, in sides of the square."""
    return (states[..., 4] + 0.85) / 10


def _move(x: Tensor, v: Tensor, radius: Tensor, mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move for one step; return positions, velocities, and whose state each ball has read."""
    x, v = x.clone(), v.clone()
    left = torch.ones(len(x))
    read = torch.eye(x.shape[1], dtype=torch.bool).repeat(len(x), 1, 1)
    busy = torch.arange(len(x))
    while len(busy):
        pair_times = _pair_times(x[busy], v[busy], radius[busy])
        wall_times = _wall_times(x[busy], v[busy], radius[busy])
        times, first = torch.cat((pair_times, wall_times.flatten(1)), 1).min(1)
        elapsed = torch.minimum(times, left[busy])
        x[busy] += elapsed.view(-1, 1, 1) * v[busy]
        happens = times < left[busy]
        left[busy] -= elapsed
        busy, first = busy[happens], first[happens]
        met = first < len(_PAIRS)
        _collide(busy[met], _PAIRS[first[met]], x, v, mass, read)
        ball, axis = ((first - len(_PAIRS))[~met] // 2, (first - len(_PAIRS))[~met] % 2)
        v[busy[~met], ball, axis] *= -1
    return x, v, read


def _pair_times(x: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """Return when each pair will touch, `[B, pairs]`; infinite where it will not."""
    i, j = _PAIRS.T
    offset, velocity = x[:, i] - x[:, j], v[:, i] - v[:, j]
    approach = (offset * velocity).sum(-1)
    gap = offset.square().sum(-1) - (radius[:, i] + radius[:, j]).square()
    square = approach.square() - velocity.square().sum(-1) * gap
    meets = (approach < 0) & (square > 0)
    time = gap / (square.clamp(min=0).sqrt() - approach).clamp(min=1e-12)
    return torch.where(meets, time.clamp(min=0.0), math.inf)


def _wall_times(x: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """Return when each ball will touch a wall along each axis, `[B, N, 2]`."""
    r = radius.unsqueeze(-1)
    distance = torch.where(v > 0, 1 - r - x, x - r).clamp(min=0.0)
    return torch.where(v == 0, math.inf, distance / v.abs().clamp(min=1e-12))


def _collide(
    worlds: Tensor, pairs: Tensor, x: Tensor, v: Tensor, mass: Tensor, read: Tensor
) -> None:
    """Exchange the impulse of one pair in each of some worlds, in place."""
    i, j = pairs.T
    normal = torch.nn.functional.normalize(x[worlds, i] - x[worlds, j], dim=-1)
    speed = ((v[worlds, i] - v[worlds, j]) * normal).sum(-1)
    m_i, m_j = mass[worlds, i], mass[worlds, j]
    impulse = (2 * m_i * m_j / (m_i + m_j) * speed).unsqueeze(-1) * normal
    v[worlds, i] -= impulse / m_i.unsqueeze(-1)
    v[worlds, j] += impulse / m_j.unsqueeze(-1)
    both = read[worlds, i] | read[worlds, j]
    read[worlds, i] = both
    read[worlds, j] = both
