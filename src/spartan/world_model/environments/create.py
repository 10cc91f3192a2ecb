r"""`CreateLite`: balls among ladders, a cannon and walls, in changing numbers.

A ball in the unit square goes through the first of these that applies:

    in the cannon:  v' = 0.07 d_cannon
    on a ladder:    v' = 0.05 d_ladder                   of the nearest, if it is on two
    else:           v' = v + gravity + bounces off balls and walls it touches and approaches

and x' = x + v'. Bounces off balls swap the velocities along the line of centres; walls return half
of the speed. All are computed from the state before the step, so that what a ball reads is exactly
what acts on it.

After the CREATE puzzles of Jain, Szot, Lim, ICML 2020, which Lei et al., arXiv 2411.06890, modified
without publishing their levels; this is a world of our own with the same kinds of objects.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from spartan.errors import WorldError
from spartan.world_model.environments.base import Environment, Shape, Step

_LADDERS, _CANNON, _WALLS, _BALLS = slice(0, 2), slice(2, 3), slice(3, 5), slice(5, None)
_UNIT = 0.05  # of velocities
_GRAVITY, _LADDER_SPEED, _CANNON_SPEED, _RESTITUTION = 0.01, 0.05, 0.07, 0.5
# Half widths and half heights, in sides of the square.
BALL_RADIUS, LADDER, CANNON, WALL = 0.065, (0.08, 0.22), (0.1, 0.1), (0.16, 0.025)
_LEAST, _MOST = 4, 9  # objects
_SINGLE = ("no gravity", "ladders reversed", "elastic walls", "cannon off")
_PARTS: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (2,), (3,), (0, 1), (2, 3))
_ON = torch.zeros(len(_PARTS), len(_SINGLE), dtype=torch.bool)
for _number, _parts in enumerate(_PARTS):
    _ON[_number, list(_parts)] = True


class CreateLite(Environment):
    """Four to nine objects: balls, up to two ladders, up to one cannon, up to two walls.

    Args:
        balls: The fewest and the most balls, from 2 to 6. More than four are not in training data,
            and are there to be tested on.

    Raises:
        WorldError: There is no such range.
    """

    name: ClassVar[str] = "create"
    features: ClassVar[tuple[str, ...]] = (
        *("x", "y", "v_x", "v_y", "direction x", "direction y"),
        *("is ladder", "is cannon", "is wall", "is ball"),
    )
    changing: ClassVar[int] = 4
    interventions: ClassVar[tuple[str, ...]] = tuple(
        " + ".join(_SINGLE[part] for part in parts) or "none" for parts in _PARTS
    )
    seen: ClassVar[int] = 5
    episode: ClassVar[int] = 1

    def __init__(self, balls: tuple[int, int] = (2, 4)) -> None:
        if not 2 <= balls[0] <= balls[1] <= 6:
            raise WorldError(f"balls={balls} given; two numbers from 2 to 6, in order, needed.")
        self.balls = balls
        self.objects = _BALLS.start + balls[1]

    def start(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(count, *shape, generator=generator)

        states = torch.zeros(count, self.objects, len(self.features))
        states[..., :2] = uniform(-0.9, 0.9, self.objects, 2)
        states[:, _BALLS, 2:4] = uniform(-1, 1, self.balls[1], 2)
        states[:, _LADDERS, 5] = torch.where(uniform(0, 1, 2) < 0.5, -1.0, 1.0)
        aim = uniform(0, 2 * math.pi, 1)
        states[:, _CANNON, 4], states[:, _CANNON, 5] = aim.cos(), aim.sin()
        for kind, where in enumerate((_LADDERS, _CANNON, _WALLS, _BALLS)):
            states[:, where, 6 + kind] = 1
        mask = self._draw_mask(count, generator)
        return states * mask.unsqueeze(-1), mask

    def step(
        self, states: Tensor, mask: Tensor, intervention: Tensor, generator: torch.Generator
    ) -> Step:
        on = _ON[intervention].unsqueeze(-1)
        no_gravity, reversed_, elastic, cannon_off = on.unbind(1)
        balls, there = states[:, _BALLS], mask[:, _BALLS]
        x, v = (balls[..., :2] + 1) / 2, balls[..., 2:4] * _UNIT

        borderline = torch.zeros(len(states), self.objects, self.objects, dtype=torch.bool)
        borderline[:, _BALLS] = _within(x, states, 1.1) & ~_within(x, states, 0.9)
        in_cannon = _inside(x, states[:, _CANNON], CANNON) & _both(there, mask[:, _CANNON])
        in_ladder = _inside(x, states[:, _LADDERS], LADDER) & _both(there, mask[:, _LADDERS])
        off = in_cannon.any(-1) & cannon_off
        fired = in_cannon & ~cannon_off.unsqueeze(-1)
        shot = fired.any(-1)
        # Being near both ladders, a ball reads of both which is nearer.
        climbs = in_ladder & ~shot.unsqueeze(-1)
        climbing = climbs.any(-1)
        free = ~shot & ~climbing & there

        bump, bumps = _bounce_off_balls(x, v, there)
        stop, stops = _bounce_off_walls(x, v, states[:, _WALLS], elastic)
        stops = stops & _both(there, mask[:, _WALLS])
        falling = torch.zeros_like(v)
        falling[..., 1] = -_GRAVITY * ~no_gravity
        flying = v + falling + (bump * bumps.unsqueeze(-1)).sum(2)
        flying = flying + (stop * stops.unsqueeze(-1)).sum(2)

        climb = _nearest_direction(x, states[:, _LADDERS], climbs)
        climb = _LADDER_SPEED * climb * torch.where(reversed_, -1.0, 1.0).unsqueeze(-1)
        shoot = _CANNON_SPEED * states[:, _CANNON, 4:6]
        v = torch.where(
            shot.unsqueeze(-1), shoot, torch.where(climbing.unsqueeze(-1), climb, flying)
        )
        x, v = _stay_inside(x + v, v)

        following = states.clone()
        moved = torch.cat((2 * x - 1, v / _UNIT), -1)
        following[:, _BALLS, :4] = torch.where(there.unsqueeze(-1), moved, balls[..., :4])
        edges = torch.zeros_like(borderline)
        edges[:, _BALLS, _CANNON] = fired
        edges[:, _BALLS, _LADDERS] = climbs
        edges[:, _BALLS, _BALLS] = bumps & free.unsqueeze(-1)
        edges[:, _BALLS, _WALLS] = stops & free.unsqueeze(-1)
        targets = torch.zeros_like(mask)
        targets[:, _BALLS] = (free & no_gravity) | (climbing & reversed_) | (off & there)
        targets[:, _BALLS] |= free & stops.any(-1) & elastic
        return Step(following, edges, targets, edges.flatten(1).any(1), borderline)

    def shapes(self, state: Tensor, mask: Tensor) -> list[Shape | None]:
        kinds = (
            *(("ladder", *LADDER, "#e6d5a8"),) * 2,
            ("cannon", *CANNON, "#e3b8b8"),
            *(("wall", *WALL, "#999999"),) * 2,
            *(("", BALL_RADIUS, None, "#9db4c8"),) * self.balls[1],
        )
        drawn: list[Shape | None] = []
        for row, there, (label, width, height, color) in zip(
            state.tolist(), mask.tolist(), kinds, strict=True
        ):
            place = (row[0] + 1) / 2, (row[1] + 1) / 2
            drawn.append(Shape(label, *place, width, height, color) if there else None)
        return drawn

    def _draw_mask(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw how many there are of each kind; the first slots of a kind are taken."""
        low, high = self.balls

        def up_to(least: int, most: int | Tensor) -> Tensor:
            span = torch.as_tensor(most) - least + 1
            return least + (torch.rand(count, generator=generator) * span).long()

        balls = up_to(low, high)
        # A ladder and a wall too few are made up for, so that there are always four objects.
        ladders, cannons = up_to(0, 2), up_to(0, 1)
        walls = up_to(0, (_MOST - balls - ladders - cannons).clamp(max=2))
        missing = (_LEAST - balls - ladders - cannons - walls).clamp(min=0)
        ladders = (ladders + missing).clamp(max=2)
        walls = walls + (_LEAST - balls - ladders - cannons - walls).clamp(min=0)
        numbers = ((ladders, 2), (cannons, 1), (walls, 2), (balls, high))
        return torch.cat([torch.arange(slots) < n.unsqueeze(1) for n, slots in numbers], 1)


def _both(balls: Tensor, others: Tensor) -> Tensor:
    return balls.unsqueeze(2) & others.unsqueeze(1)


def _offsets(x: Tensor, others: Tensor) -> Tensor:
    """Return from each of the other objects to each ball, `[B, balls, others, 2]`."""
    return x.unsqueeze(2) - ((others[..., :2] + 1) / 2).unsqueeze(1)


def _inside(x: Tensor, others: Tensor, size: tuple[float, float]) -> Tensor:
    return (_offsets(x, others).abs() < torch.tensor(size)).all(-1)


def _within(x: Tensor, states: Tensor, part: float) -> Tensor:
    """Return whom each ball would be in or touch at a part of that distance, `[B, balls, N]`."""
    near = torch.zeros(*x.shape[:2], states.shape[1], dtype=torch.bool)
    touched = WALL[0] + BALL_RADIUS, WALL[1] + BALL_RADIUS
    for where, (width, height) in ((_LADDERS, LADDER), (_CANNON, CANNON), (_WALLS, touched)):
        near[..., where] = _inside(x, states[:, where], (part * width, part * height))
    near[..., _BALLS] = _offsets(x, states[:, _BALLS]).norm(dim=-1) < part * 2 * BALL_RADIUS
    return near


def _nearest_direction(x: Tensor, ladders: Tensor, climbs: Tensor) -> Tensor:
    distance = _offsets(x, ladders)[..., 0].abs().masked_fill(~climbs, math.inf)
    nearest = distance.argmin(-1, keepdim=True).expand(-1, -1, 2)
    return ladders[..., 4:6].gather(1, nearest)


def _bounce_off_balls(x: Tensor, v: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Return the change of velocity by each other ball, and by which there is one."""
    away = x.unsqueeze(2) - x.unsqueeze(1)
    distance = away.norm(dim=-1)
    normal = away / distance.clamp(min=1e-9).unsqueeze(-1)
    closing = ((v.unsqueeze(2) - v.unsqueeze(1)) * normal).sum(-1)
    touching = distance < 2 * BALL_RADIUS
    own = torch.eye(x.shape[1], dtype=torch.bool)
    return -closing.unsqueeze(-1) * normal, touching & (closing < 0) & ~own & _both(there, there)


def _bounce_off_walls(
    x: Tensor, v: Tensor, walls: Tensor, elastic: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the change of velocity by each wall, and by which there is one."""
    offset = _offsets(x, walls)
    depth = torch.tensor(WALL) + BALL_RADIUS - offset.abs()
    along = torch.nn.functional.one_hot(depth.argmin(-1), 2).float()
    normal = along * offset.sign()
    closing = (v.unsqueeze(2) * normal).sum(-1)
    touching = (depth > 0).all(-1)
    returned = torch.where(elastic, 1.0, _RESTITUTION).unsqueeze(-1).unsqueeze(-1)
    return -(1 + returned) * closing.unsqueeze(-1) * normal, touching & (closing < 0)


def _stay_inside(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Stop at the sides of the square."""
    held = x.clamp(0.0, 1.0)
    return held, torch.where(held == x, v, torch.zeros_like(v))
