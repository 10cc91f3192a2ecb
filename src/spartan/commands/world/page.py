"""HTML report and animation of a world model: graph scores, errors, curves."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from PIL import Image

from spartan.commands.options.world import WorldConfig
from spartan.commands.pages import drawing
from spartan.commands.pages.rendering import write_rendered
from spartan.commands.world.job import WorldRun
from spartan.commands.world.scores import SCORED, WorldScores
from spartan.world_model.drawing import draw_world, save_animation, simulate
from spartan.world_model.environments import Environment, make_environment
from spartan.world_model.metrics import found_graphs
from spartan.world_model.model import WorldModel
from spartan.world_model.transitions import Transitions

# Steps of the animation, and states shown with their graphs, which set the size of the page.
_FRAMES = 60
_STATES = 6
_TITLES = {
    "sparse": "SPARTAN",
    "unrefined": "SPARTAN, unrefined",
    "dense": "fully connected",
    "identity": "no interaction",
    "nearest": "nearest object",
    "global": "global graph",
}


def write_world_page(world: WorldRun, config: WorldConfig, table: WorldScores) -> None:
    """Write the page and the animation it shows.

    Raises:
        FileError: It cannot be written.
    """
    environment = make_environment(config.env)
    model = world.model("sparse")
    seen = range(environment.seen)
    frames = []
    shown = seen if len(seen) < 4 else (0, len(seen) // 2, len(seen) - 1)
    for number in shown:
        frames += animate(environment, number, _FRAMES // len(shown), config.seed, model)
    save_animation(world.animation_path, frames)
    states = [
        animate(environment, i % environment.seen, 3, config.seed + 100 + i, model)[-1]
        for i in range(_STATES)
    ]
    write_rendered(
        world.run.report_path,
        "world/page.html.j2",
        title=world.run.name,
        table=table,
        scored=SCORED,
        animation=base64.b64encode(world.animation_path.read_bytes()).decode(),
        animated=", then ".join(environment.interventions[number] for number in shown),
        states=[_png(picture) for picture in states],
        curves=_curves(world.run.metrics(), table, config),
        options=dataclasses.asdict(config),
    )


def animate(
    environment: Environment,
    intervention: int,
    steps: int,
    seed: int,
    model: WorldModel | None,
    token: torch.Tensor | None = None,
) -> list[Image.Image]:
    """Draw a simulated trajectory, with the true graph and, of a model, the one it finds.

    Args:
        environment: The world.
        intervention: Which is on.
        steps: Frames.
        seed: Of the world.
        model: Reads the graphs.
        token: Given to the model in place of the intervention.
    """
    states, mask, truth = simulate(environment, steps, intervention, seed)
    found = None
    if model is not None:
        masks = mask.expand(steps, -1)
        known = torch.full((steps,), intervention)
        data = Transitions(states, states[..., : environment.changing], masks, known)
        found = found_graphs(model, data, token=token)
    name = environment.interventions[intervention]
    return [
        draw_world(
            environment, states[t], mask, truth[t], None if found is None else found[t],
            f"{environment.name}, {name}, step {t + 1}",
        )
        for t in range(steps)
    ]  # fmt: skip


def _curves(
    rows: Sequence[dict[str, Any]], table: WorldScores, config: WorldConfig
) -> list[tuple[str, str, str]]:
    names = list(dict.fromkeys(row["split"] for row in rows))
    begins = {name: min(row["step"] for row in rows if row["split"] == name) for name in names}

    def series(name: str, key: str) -> tuple[list[float], list[float]]:
        found = [row for row in rows if row["split"] == name and key in row]
        return [row["step"] - begins[name] for row in found], [row[key] for row in found]

    def draw(key: str, shown: Sequence[str], limit: float | None) -> Any:
        def on(axes: Axes) -> None:
            for name in shown:
                color = drawing.color_of(names.index(name))
                axes.plot(*series(name, key), color=color, label=_TITLES[name], linewidth=1.4)
            if limit is not None:
                axes.axhline(limit, color="#222222", linestyle=":", linewidth=1)

        return on

    by_edges = config.edges is not None
    gated = [name for name in ("unrefined", "sparse", "global") if name in names]
    priced = [
        name for name in gated if any(row["split"] == name and "paths" in row for row in rows)
    ]
    error_limit, edge_limit = (None, table.limit) if by_edges else (table.limit, None)
    dotted = "Dotted: what is allowed."
    entries = (
        ("Error", "held_out_error", names, error_limit, True, "held-out error"),
        ("Edges", "held_out_edges", gated, edge_limit, False, "edges per state"),
        ("Paths", "paths", priced, None, True, "paths per state"),
        ("Multiplier", "multiplier", priced, None, True, "λ"),
        ("Constraint", "violation", priced, 0.0, False, "violation"),
    )
    notes = {
        "Error": "Of held-out data, with gates as they are when not training. "
        + ("" if by_edges else dotted),
        "Edges": "Between objects, of held-out data. " + (dotted if by_edges else ""),
        "Paths": "Through gates as they are drawn in training.",
        "Multiplier": "The weight of a path is "
        + ("λ." if by_edges else "1/λ: λ falls while the error is below what is allowed."),
        "Constraint": "What was measured in a batch, relative to what is allowed, less 1.",
    }
    return [
        (
            heading,
            notes[heading],
            drawing.figure(draw(key, shown, limit), "step", label, legend=True, log=log),
        )
        for heading, key, shown, limit, log, label in entries
    ]


def _png(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()
