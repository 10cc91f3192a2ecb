"""Draws world states with found and true graphs, as images and GIF animations."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from spartan.files import write_atomically
from spartan.seeds import derive_seed
from spartan.world_model.environments.base import Environment, Shape

_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
RIGHT, WRONG, MISSED = "#2e8b57", "#d1495b", "#c98a00"
SIZE = 360
_SCALE = 2  # drawn larger, then reduced: smooth edges
_TOP = 26  # pixels for the title


def draw_world(
    environment: Environment,
    state: Tensor,
    mask: Tensor,
    truth: Tensor,
    found: Tensor | None = None,
    title: str = "",
) -> Image.Image:
    """Draw one state and the edges of its graph, each from the sender to the receiver.

    Green edges are true and found, red ones found and not true, amber ones true and not found. The
    targets of the intervention have a ring in the same colours. Without a found graph, the true one
    is drawn green.

    Args:
        environment: Says how objects look.
        state: `[N, F]`.
        mask: Boolean `[N]`.
        truth: Boolean `[N, N + 1]`.
        found: The same, of a model.
        title: Written above.
    """
    side = SIZE * _SCALE
    image = Image.new("RGB", (side, side + _TOP * _SCALE), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=12 * _SCALE)
    draw.rectangle((0, _TOP * _SCALE, side - 1, side + _TOP * _SCALE - 1), outline="#bbbbbb")
    shapes = environment.shapes(state, mask)
    found = truth if found is None else found
    # Large ones first, so that what lies inside them is seen.
    for shape in sorted((s for s in shapes if s), key=lambda s: -(s.half_height or 0)):
        _draw_shape(draw, shape, font)
    n = len(shapes)
    for i, receiver in enumerate(shapes):
        if receiver is None:
            continue
        for j in range(n + 1):
            color = _color(bool(found[i, j]), bool(truth[i, j]))
            if color is None or i == j:
                continue
            sender = None if j == n else shapes[j]
            if j == n:
                _draw_ring(draw, receiver, color)
            elif sender is not None:
                _draw_arrow(draw, sender, receiver, color)
    draw.rectangle((0, 0, side, _TOP * _SCALE - 1), fill="white")  # over what sticks out
    draw.text((8 * _SCALE, 5 * _SCALE), title, fill="#222222", font=font)
    return image.resize((SIZE, SIZE + _TOP), Image.Resampling.LANCZOS)


def save_animation(path: Path, frames: list[Image.Image], milliseconds: int = 150) -> None:
    """Write frames as a GIF that repeats.

    Raises:
        FileError: It cannot be written.
    """
    # One palette for all frames, or colours would flicker; the edges' own are always in it.
    keys = Image.new("RGB", frames[0].size, "white")
    draw = ImageDraw.Draw(keys)
    for number, color in enumerate((RIGHT, WRONG, MISSED)):
        draw.rectangle((0, 60 * number, frames[0].width, 60 * number + 50), fill=color)
    strip = Image.new("RGB", (frames[0].width, 2 * frames[0].height))
    strip.paste(frames[0])
    strip.paste(keys, (0, frames[0].height))
    palette = strip.quantize(128)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]

    def write(temporary: Path) -> None:
        small[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=small[1:],
            duration=milliseconds,
            loop=0,
        )

    write_atomically(path, write)


def simulate(
    environment: Environment, steps: int, intervention: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one world.

    Returns:
        States `[steps, N, F]`, mask `[N]`, true graphs `[steps, N, N + 1]`.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "world/drawn", 0))
    state, mask = environment.start(1, generator)
    states, graphs = [], []
    for _ in range(steps):
        step = environment.step(state, mask, torch.tensor([intervention]), generator)
        states.append(state[0])
        graphs.append(torch.cat((step.edges[0], step.targets[0].unsqueeze(-1)), -1))
        state = step.states
    return torch.stack(states), mask[0], torch.stack(graphs)


def _color(found: bool, true: bool) -> str | None:
    if found:
        return RIGHT if true else WRONG
    return MISSED if true else None


def _point(shape: Shape) -> tuple[float, float]:
    side = SIZE * _SCALE
    return shape.x * side, _TOP * _SCALE + (1 - shape.y) * side


def _box(shape: Shape, margin: float = 0.0) -> tuple[float, float, float, float]:
    (x, y), side = _point(shape), SIZE * _SCALE
    height = shape.half_width if shape.half_height is None else shape.half_height
    dx, dy = shape.half_width * side + margin, height * side + margin
    return x - dx, y - dy, x + dx, y + dy


def _draw_shape(draw: ImageDraw.ImageDraw, shape: Shape, font: _Font) -> None:
    paint = draw.ellipse if shape.half_height is None else draw.rectangle
    paint(_box(shape), fill=shape.color, outline="#555555")
    draw.text(_point(shape), shape.label, fill="#222222", font=font, anchor="mm")


def _draw_ring(draw: ImageDraw.ImageDraw, shape: Shape, color: str) -> None:
    draw.ellipse(_box(shape, 5.0 * _SCALE), outline=color, width=2 * _SCALE)


def _draw_arrow(draw: ImageDraw.ImageDraw, sender: Shape, receiver: Shape, color: str) -> None:
    (x0, y0), (x1, y1) = _point(sender), _point(receiver)
    length = math.hypot(x1 - x0, y1 - y0)
    if length < 1:
        return
    ux, uy = (x1 - x0) / length, (y1 - y0) / length
    # Beside the line between the centres, so that both directions are seen.
    x0, y0, x1, y1 = (x0 - 3 * uy, y0 + 3 * ux, x1 - 3 * uy, y1 + 3 * ux)
    draw.line((x0, y0, x1, y1), fill=color, width=2 * _SCALE)
    head = 7.0 * _SCALE
    left = (x1 - head * ux - head / 2 * uy, y1 - head * uy + head / 2 * ux)
    right = (x1 - head * ux + head / 2 * uy, y1 - head * uy - head / 2 * ux)
    draw.polygon(((x1, y1), left, right), fill=color)
