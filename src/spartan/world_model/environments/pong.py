r"""Pong by the mechanics of the interventional Pong of CITRIS, as states of four objects.

One step, in pixels of a field of 32 × 32, with the ball's direction (sin a, cos a):

    1. paddles move up to 1.5 towards where the ball was, and tremble;
    2. the ball moves by 2; beyond its goal lines it scores, restarts in the middle, and paddles
       are placed anew; five points of one side set both scores to 0;
    3. otherwise it is reflected at top and bottom, and by a paddle that is where it arrives;
    4. it trembles, in position and direction.

An event is a ball that arrives at a paddle's line without scoring, hit or missed: where hits were
more frequent than misses, a model would do best to look at paddles only when they miss.

Mechanics and constants: Lippe et al., "CITRIS: Causal Identifiability from Temporal Intervened
Sequences", ICML 2022, and its published code. The interventions' constants are our own: those of
Lei et al., arXiv 2411.06890, are not published.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from spartan.world_model.environments.base import Environment, Shape, Step

FIELD = 32.0
PADDLES = (5.0, 27.0)
PADDLE_HEIGHT, PADDLE_WIDTH, BALL_RADIUS = 6.0, 2.0, 1.2
_SPEED, _PADDLE_SPEED, _POINTS = 2.0, 1.5, 5
_PADDLE_NOISE, _BALL_NOISE, _ANGLE_NOISE = 0.5, 0.2, 0.1
_LOW, _HIGH = 3.2, 28.8  # of the ball's centre
_PADDLE_LOW, _PADDLE_HIGH = 5.0, 27.0
_REACH = PADDLE_HEIGHT / 2 + BALL_RADIUS
# Where the ball's centre is when it touches the face of the left and of the right paddle.
_FACES = (
    PADDLES[0] + PADDLE_WIDTH / 2 + BALL_RADIUS,
    PADDLES[1] - PADDLE_WIDTH / 2 - BALL_RADIUS,
)
_LEFT, _RIGHT, _BALL, _SCORE = range(4)
_CURVE, _GRAVITY, _FRICTION, _BOUNCE = 0.25, 1.0, 0.5, 0.6

_SINGLE = ("curved ball", "left inverted", "right inverted", "friction", "bounce", "gravity")
# Which single interventions each of `PongState.interventions` is made of.
_PARTS: tuple[tuple[int, ...], ...] = (
    *((), (0,), (1,), (2,), (3,), (4,), (5,), (4, 5)),
    *((3, 4), (0, 1), (5, 2)),
)
_ON = torch.zeros(len(_PARTS), len(_SINGLE), dtype=torch.bool)
for _number, _parts in enumerate(_PARTS):
    _ON[_number, list(_parts)] = True


class PongState(Environment):
    """Left paddle, right paddle, ball and score; the score's x and y are the two sides' points."""

    name: ClassVar[str] = "pong"
    objects: int = 4
    features: ClassVar[tuple[str, ...]] = (
        *("x", "y", "direction x", "direction y"),
        *("is left", "is right", "is ball", "is score"),
    )
    changing: ClassVar[int] = 4
    interventions: ClassVar[tuple[str, ...]] = tuple(
        " + ".join(_SINGLE[part] for part in parts) or "none" for parts in _PARTS
    )
    seen: ClassVar[int] = 8
    episode: ClassVar[int] = 1

    def start(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        u = torch.rand(count, 5, generator=generator)
        points = torch.randint(_POINTS, (count, 2), generator=generator).float()
        paddles = _PADDLE_LOW + (_PADDLE_HIGH - _PADDLE_LOW) * u[:, :2]
        ball = torch.tensor((_LOW + 1, _LOW)) + (_HIGH - _LOW - torch.tensor((2, 0))) * u[:, 2:4]
        states = _encode(paddles, ball, 2 * math.pi * u[:, 4], points)
        return states, torch.ones(count, self.objects, dtype=torch.bool)

    def step(
        self, states: Tensor, mask: Tensor, intervention: Tensor, generator: torch.Generator
    ) -> Step:
        count = len(states)
        curved, left_inverted, right_inverted, friction, bounce, gravity = _ON[intervention].T
        paddles = FIELD * (states[:, [_LEFT, _RIGHT], 1] + 1) / 2
        x, y = (FIELD * (states[:, _BALL, :2] + 1) / 2).unbind(-1)
        angle = torch.atan2(states[:, _BALL, 2], states[:, _BALL, 3])
        points = (states[:, _SCORE, :2] + 1) * _POINTS / 2
        noise = torch.randn(count, 5, generator=generator)
        fresh = torch.rand(count, 3, generator=generator)

        inverted = torch.stack((left_inverted, right_inverted), 1)
        goal = torch.where(inverted, FIELD - y.unsqueeze(1), y.unsqueeze(1))
        moved = paddles + (goal - paddles).clamp(-_PADDLE_SPEED, _PADDLE_SPEED)
        moved = (moved + _PADDLE_NOISE * noise[:, :2]).clamp(_PADDLE_LOW, _PADDLE_HIGH)

        in_middle = (x > 12) & (x < 20)
        in_left = x < FIELD / 2
        angle = angle + curved * _CURVE * torch.sin(8 * math.pi * x / FIELD)
        speed = torch.where(friction & in_middle, _SPEED * _FRICTION, _SPEED)
        new_x = x + speed * angle.sin()
        left_scores, right_scores = new_x > _HIGH, new_x < _LOW
        scored = left_scores | right_scores

        new_y = y + speed * angle.cos() - _GRAVITY * (gravity & in_left)
        over, under = new_y > _HIGH, new_y < _LOW
        new_y = torch.where(over, 2 * _HIGH - new_y, torch.where(under, 2 * _LOW - new_y, new_y))
        angle = torch.where(over | under, math.pi - angle, angle)
        reached = torch.stack((new_x < _FACES[0], new_x > _FACES[1]), 1)
        reached &= torch.stack((angle.sin() < 0, angle.sin() > 0), 1)
        # The paddle is tested where it was.
        hits = reached & ((new_y.unsqueeze(1) - paddles).abs() < _REACH) & ~scored.unsqueeze(1)
        hit = hits.any(1)
        face = torch.where(hits[:, 0], _FACES[0], _FACES[1])
        new_x = torch.where(hit, 2 * face - new_x, new_x)
        angle = torch.where(hit, -angle, angle)
        angle = angle + _BOUNCE * (bounce & hit) * torch.where(hits[:, 0], 1.0, -1.0)

        middle = FIELD / 2
        new_x = torch.where(scored, middle, (new_x + _BALL_NOISE * noise[:, 2]).clamp(_LOW, _HIGH))
        new_y = torch.where(scored, middle, (new_y + _BALL_NOISE * noise[:, 3]).clamp(_LOW, _HIGH))
        angle = torch.where(scored, 2 * math.pi * fresh[:, 2], angle + _ANGLE_NOISE * noise[:, 4])
        placed = _PADDLE_LOW + (_PADDLE_HIGH - _PADDLE_LOW) * fresh[:, :2]
        moved = torch.where(scored.unsqueeze(1), placed, moved)
        points = points + torch.stack((left_scores, right_scores), 1)
        points = points * (points < _POINTS - 0.5).all(1, keepdim=True)

        edges = torch.zeros(count, 4, 4, dtype=torch.bool)
        edges[:, [_LEFT, _RIGHT], _BALL] = True
        edges[:, _BALL, _LEFT], edges[:, _BALL, _RIGHT] = hits[:, 0], hits[:, 1]
        edges[:, _SCORE, _BALL] = scored
        targets = torch.zeros(count, 4, dtype=torch.bool)
        targets[:, _LEFT], targets[:, _RIGHT] = left_inverted, right_inverted
        on_ball = curved | (friction & in_middle) | (gravity & in_left)
        targets[:, _BALL] = on_ball | (bounce & hit)
        following = _encode(moved, torch.stack((new_x, new_y), 1), angle, points)
        return Step(following, edges, targets, reached.any(1) & ~scored)

    def shapes(self, state: Tensor, mask: Tensor) -> list[Shape | None]:
        rows = [((row[0] + 1) / 2, (row[1] + 1) / 2) for row in state.tolist()]
        points = ((state[_SCORE, :2] + 1) * _POINTS / 2).round().int().tolist()
        width, height = PADDLE_WIDTH / 2 / FIELD, PADDLE_HEIGHT / 2 / FIELD
        paddles = [Shape("", *rows[i], width, height, "#6a4c93") for i in (_LEFT, _RIGHT)]
        score = Shape(f"{points[0]} : {points[1]}", 0.5, 0.93, 0.1, 0.04, "#dddddd")
        return [*paddles, Shape("", *rows[_BALL], BALL_RADIUS / FIELD), score]


def _encode(paddles: Tensor, ball: Tensor, angle: Tensor, points: Tensor) -> Tensor:
    """Return features: positions in [-1, 1], the ball's direction, who is who."""
    states = torch.zeros(len(ball), 4, len(PongState.features))
    states[:, [_LEFT, _RIGHT], 0] = 2 * torch.tensor(PADDLES) / FIELD - 1
    states[:, [_LEFT, _RIGHT], 1] = 2 * paddles / FIELD - 1
    states[:, _BALL, :2] = 2 * ball / FIELD - 1
    states[:, _BALL, 2], states[:, _BALL, 3] = angle.sin(), angle.cos()
    states[:, _SCORE, :2] = 2 * points / _POINTS - 1
    states[..., 4:] = torch.eye(4)
    return states
