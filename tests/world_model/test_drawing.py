"""Pictures of graphs, counted by their colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor

from spartan.world_model.drawing import (
    MISSED,
    RIGHT,
    WRONG,
    draw_world,
    save_animation,
    simulate,
)
from spartan.world_model.environments import ENVIRONMENTS


def colored(image: Image.Image, color: str) -> int:
    pixels = np.asarray(image.convert("RGB")).astype(int)
    return int((np.abs(pixels - ImageColor.getrgb(color)).max(-1) < 30).sum())


def test_edges_have_the_colours_of_what_they_are() -> None:
    for make in ENVIRONMENTS.values():
        world = make()
        states, mask, truth = simulate(world, 1, 0, seed=1)
        none = torch.zeros_like(truth[0])
        edge = none.clone()
        there = mask.nonzero().flatten()
        edge[there[-1], there[0]] = True
        for true, found, color in (
            (edge, edge, RIGHT),
            (none, edge, WRONG),
            (edge, none, MISSED),
        ):
            image = draw_world(world, states[0], mask, true, found)
            for other in (RIGHT, WRONG, MISSED):
                assert (colored(image, other) > 20) == (other == color), (world.name, color)


def test_colours_that_come_late_are_in_the_animation(tmp_path: Path) -> None:
    world = ENVIRONMENTS["pong"]()
    states, mask, truth = simulate(world, 1, 0, seed=1)
    none = torch.zeros_like(truth[0])
    wrong = none.clone()
    wrong[0, 2] = True
    plain = draw_world(world, states[0], mask, none)
    late = draw_world(world, states[0], mask, none, wrong)
    save_animation(tmp_path / "a.gif", [plain, plain, late])
    with Image.open(tmp_path / "a.gif") as animation:
        animation.seek(animation.n_frames - 1)
        assert colored(animation, WRONG) > 0.5 * colored(late, WRONG) > 20
