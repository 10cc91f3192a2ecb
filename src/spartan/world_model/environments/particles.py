r"""`GatedParticles`: particles that push each other within a radius.

    active_ij = |x_i - x_j| < 0.3,  i ≠ j
    v'_i = ½ (v_i + 0.08 Σ_j active_ij c_j (x_i - x_j) / |x_i - x_j| + wind_i)
    x'_i = x_i + v'_i                                   held inside the unit square

The force has the same size anywhere inside the radius: one that vanished at the rim could not be
found there. Interventions are winds along x that blow on some of the particles.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from spartan.world_model.environments.base import Environment, Shape, Step

RADIUS = 0.3
_FORCE = 0.08  # also the unit of velocities
_WIND = 0.8 * _FORCE
_DRAG = 0.5
_BLOWN_ON = ((), (0,), (1,), (2,), (3,), (0, 2), (1, 3))


class GatedParticles(Environment):
    """Four particles; which of them interact changes from state to state."""

    name: ClassVar[str] = "particles"
    objects: int = 4
    features: ClassVar[tuple[str, ...]] = (
        *("x", "y", "v_x", "v_y", "strength"),
        *("is 0", "is 1", "is 2", "is 3"),
    )
    changing: ClassVar[int] = 4
    interventions: ClassVar[tuple[str, ...]] = (
        *("none", "wind on 0", "wind on 1", "wind on 2", "wind on 3"),
        *("wind on 0 and 2", "wind on 1 and 3"),
    )
    seen: ClassVar[int] = 5
    episode: ClassVar[int] = 1

    def start(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        n = self.objects
        uniform = torch.rand(count, n, 5, generator=generator) * 2 - 1
        uniform[..., 4] /= 2  # strengths from 0.5 to 1.5
        identity = torch.eye(n).expand(count, n, n)
        return torch.cat((uniform, identity), -1), torch.ones(count, n, dtype=torch.bool)

    def step(
        self, states: Tensor, mask: Tensor, intervention: Tensor, generator: torch.Generator
    ) -> Step:
        x, v = (states[..., :2] + 1) / 2, states[..., 2:4] * _FORCE
        strength = states[..., 4] + 1
        away = x.unsqueeze(2) - x.unsqueeze(1)
        distance = away.norm(dim=-1)
        near = (distance < RADIUS) & ~torch.eye(self.objects, dtype=torch.bool)
        push = near * strength.unsqueeze(1) / distance.clamp(min=1e-9)
        force = _FORCE * (push.unsqueeze(-1) * away).sum(2)
        targets = _TARGETS[intervention]
        force[..., 0] += _WIND * targets
        v = _DRAG * (v + force)
        x = (x + v).clamp(0.0, 1.0)
        changed = torch.cat((2 * x - 1, v / _FORCE), -1)
        following = torch.cat((changed, states[..., 4:]), -1)
        borderline = (distance / RADIUS - 1).abs() < 0.1
        return Step(following, near, targets, near.flatten(1).any(1), borderline)

    def shapes(self, state: Tensor, mask: Tensor) -> list[Shape | None]:
        rows = state.tolist()
        return [
            Shape(str(i), (row[0] + 1) / 2, (row[1] + 1) / 2, 0.02 + 0.02 * (row[4] + 0.5))
            for i, row in enumerate(rows)
        ]


_TARGETS = torch.zeros(len(_BLOWN_ON), GatedParticles.objects, dtype=torch.bool)
for _number, _particles in enumerate(_BLOWN_ON):
    _TARGETS[_number, list(_particles)] = True
