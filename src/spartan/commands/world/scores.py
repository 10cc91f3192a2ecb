"""Held-out scores of the models of a world run: error, rollout, graphs, influence."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spartan.commands.world.job import WorldJob, WorldRun, draw_natural
from spartan.seeds import derive_seed
from spartan.world_model.baselines import constant_graph
from spartan.world_model.constraints import ErrorBudget
from spartan.world_model.learning import measure
from spartan.world_model.metrics import (
    GraphScores,
    found_graphs,
    influence_without_path,
    oracle_threshold,
    removal_error_change,
    rollout_error,
    score_graphs,
    thresholded_graphs,
    true_graphs,
)
from spartan.world_model.model import TransitionModel, WorldModel
from spartan.world_model.transitions import Transitions

SCORED = 10_000  # transitions
HORIZON = 10  # steps of a rollout
_TRAJECTORIES = 500


@dataclass(frozen=True)
class WorldScore:
    """One line of the table.

    Attributes:
        name: What read the graphs.
        error: In units of σ, half of the states with events; None of graphs that predict nothing.
        rollout: Error over `HORIZON` steps.
        removal: Change of the error, as a share, when each object is predicted without those that
            have no true path to it.
        graphs: The graphs against the truth.
        direct_targets: Wrong targets per state where only readers of the token count; of gated
            models.
    """

    name: str
    error: float | None
    rollout: float | None
    removal: float | None
    graphs: GraphScores
    direct_targets: float | None = None


@dataclass(frozen=True)
class WorldScores:
    """The whole table.

    Attributes:
        budget: The error or the number of edges that was allowed, in words.
        limit: In a number.
        reached: What the sparse model has of it, on the held-out data it was chosen by.
        horizon: Steps of a rollout.
        scores: One for each model.
        own_removal: Change of the sparse model's error when each object is predicted without those
            that have no path to it in the model's own graph.
        influence_held: Share of the pairs without a path in the sparse model whose sender still
            has influence, with the gates held as they were.
        influence_free: The same with gates that may open in response.
    """

    budget: str
    limit: float
    reached: float
    horizon: int
    scores: list[WorldScore]
    own_removal: float
    influence_held: float
    influence_free: float

    @property
    def verdict(self) -> str:
        """Whether the budget was kept, in words."""
        kept = "kept" if self.reached <= self.limit else "not kept"
        return f"{self.budget}: {kept}, {self.reached:.4g} on held-out data"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return dataclasses.asdict(self)


def score_world(job: WorldJob, world: WorldRun, seed: int) -> WorldScores:
    """Score all models of a finished run on fresh data.

    Args:
        job: The job, for its world and budget.
        world: Its folder.
        seed: Of the data.

    Raises:
        FileError: A model is missing.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "world/scored", 0))
    environment = job.environment
    data = draw_natural(environment, SCORED, generator)
    balanced = data.balanced(generator)
    seen = range(environment.seen)
    trajectories = environment.collect(_TRAJECTORIES, HORIZON, seen, generator)
    models = {name: world.model(name) for name in job.names}
    scores = [_score("SPARTAN", models["sparse"], balanced, data, trajectories)]
    if "unrefined" in models:
        unrefined = models["unrefined"]
        scores.append(_score("SPARTAN, unrefined", unrefined, balanced, data, trajectories))
    dense = models["dense"]
    for title, threshold in (
        ("dense, best threshold", oracle_threshold(dense, data)),
        ("dense, above 1/n", 1 / environment.objects),
    ):
        graphs = thresholded_graphs(dense, data, threshold)
        scores.append(_score(title, dense, balanced, data, trajectories, graphs))
    for name, title in (("nearest", "nearest object"), ("global", "global graph")):
        if name in models:
            scores.append(_score(title, models[name], balanced, data, trajectories))
    constant = WorldScore(
        "constant graph", None, None, None, score_graphs(constant_graph(data), data)
    )
    scores.append(constant)
    scores.append(_score("no interaction", models["identity"], balanced, data, trajectories))
    sparse = models["sparse"]
    assert isinstance(sparse, TransitionModel)
    held, free = influence_without_path(sparse, data, generator)
    budget = job.budget(world)
    by_error = isinstance(budget, ErrorBudget)
    words = "error" if by_error else "edges per state"
    return WorldScores(
        budget=f"{words} at most {budget.limit:.4g}",
        limit=budget.limit,
        reached=measure(sparse, job.held_out.to(torch.device("cpu")))[0 if by_error else 1],
        horizon=HORIZON,
        scores=scores,
        own_removal=removal_error_change(sparse, data, found_graphs(sparse, data)),
        influence_held=held,
        influence_free=free,
    )


def _score(
    title: str,
    model: WorldModel,
    balanced: Transitions,
    data: Transitions,
    trajectories: Transitions,
    graphs: Tensor | None = None,
) -> WorldScore:
    direct = None
    if graphs is None:
        graphs = found_graphs(model, data)
        by_reader = score_graphs(found_graphs(model, data, direct=True), data)
        direct = by_reader.shd_with_targets - by_reader.shd
    return WorldScore(
        name=title,
        error=measure(model, balanced)[0],
        rollout=rollout_error(model, trajectories, HORIZON),
        removal=removal_error_change(model, data, true_graphs(data)),
        graphs=score_graphs(graphs, data),
        direct_targets=direct,
    )
