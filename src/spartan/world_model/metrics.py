r"""Metrics of world models: graph SHD, precision and recall, rollout and removal error.

    SHD       = Σ_{i≠j} |G_ij - G*_ij|          mean over transitions; also with the column of the
                                                 intervention
    precision = right edges / edges found       recall = right edges / true edges    over all states
    rollout   = Σ_t mean_i |x̂^i_t - x^i_t|       L2 norm over the features that change, over objects

Source: Lei, Schölkopf, Posner, arXiv 2411.06890, section 5; the aggregation of the rollout error is
not given there, this one is our own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spartan.errors import WorldError
from spartan.world_model.baselines import attention_paths
from spartan.world_model.learning import prediction_error
from spartan.world_model.model import TransitionModel, WorldModel
from spartan.world_model.paths import reachable
from spartan.world_model.transitions import Transitions

_AT_ONCE = 1000


@dataclass(frozen=True)
class GraphScores:
    """Found graphs against true ones.

    Attributes:
        shd: Wrong edges between objects, per state.
        shd_with_targets: The same with the column of the intervention.
        edges: Edges found, per state.
        true_edges: True edges, per state.
        precision: Share of the edges found that are true; 1 if none was found.
        recall: Share of the true edges that were found; 1 if there is none.
        event_precision: The same of rare edges only, those between two objects that are there in
            less than 90 % of states, and of the states in which some of them is true.
        event_recall: The same.
        clear_shd: `shd` without the pairs whose own distance is within a tenth of the threshold
            that decides on their edge; None in worlds that do not tell.
    """

    shd: float
    shd_with_targets: float
    edges: float
    true_edges: float
    precision: float
    recall: float
    event_precision: float
    event_recall: float
    clear_shd: float | None


def score_graphs(found: Tensor, data: Transitions) -> GraphScores:
    """Compare graphs with the truth.

    Args:
        found: Boolean `[M, N, N + 1]` or, for one graph for all, `[N, N + 1]`; the last column is
            the intervention's. The diagonal and objects that are not there do not count.
        data: With true graphs.

    Raises:
        WorldError: The data has no true graphs.
    """
    truth = true_graphs(data)
    n = truth.shape[1]
    counted = torch.ones_like(truth)
    own = torch.eye(n, dtype=torch.bool, device=truth.device)
    counted[..., :n] = data.mask.unsqueeze(1) & ~own
    counted &= data.mask.unsqueeze(-1)
    found = found & counted
    wrong = found ^ truth
    right, edges, true = (x[..., :n] for x in (found & truth, found, truth))
    rare = true.sum(0) < 0.9 * counted[..., :n].sum(0).clamp(min=1)
    events = (true & rare).flatten(1).any(1)
    return GraphScores(
        shd=float(wrong[..., :n].sum()) / len(data),
        shd_with_targets=float(wrong.sum()) / len(data),
        edges=float(edges.sum()) / len(data),
        true_edges=float(true.sum()) / len(data),
        precision=_share(right, edges),
        recall=_share(right, true),
        event_precision=_share(right[events] & rare, edges[events] & rare),
        event_recall=_share(right[events] & rare, true[events] & rare),
        clear_shd=None
        if data.borderline is None
        else float((wrong[..., :n] & ~data.borderline).sum()) / len(data),
    )


def true_graphs(data: Transitions) -> Tensor:
    """Return true edges and, as last column, targets, boolean `[M, N, N + 1]`."""
    if data.edges is None or data.targets is None:
        raise WorldError("These transitions do not tell the true graphs.")
    return torch.cat((data.edges, data.targets.unsqueeze(-1)), -1)


@torch.no_grad()
def found_graphs(
    model: WorldModel, data: Transitions, direct: bool = False, token: Tensor | None = None
) -> Tensor:
    """Return the graphs a model reads states by, boolean `[M, N, N + 1]`.

    Args:
        model: A transition model.
        data: States.
        direct: Whether only objects that read the intervention's token themselves are its targets.
        token: Given in place of the interventions, `[d]`.
    """
    model.eval()
    parts = []
    for begin in range(0, len(data), _AT_ONCE):
        part = data[begin : begin + _AT_ONCE]
        known = part.environment if token is None else token
        graph = model(part.states, known, part.mask).graph()
        targets = graph.direct if direct else graph.targets
        parts.append(torch.cat((graph.edges, targets.unsqueeze(-1)), -1))
    return torch.cat(parts)


@torch.no_grad()
def thresholded_graphs(model: WorldModel, data: Transitions, threshold: float) -> Tensor:
    """Return where attention, multiplied over layers, exceeds a threshold, `[M, N, N + 1]`."""
    return _attention(model, data) > threshold


@torch.no_grad()
def oracle_threshold(model: WorldModel, data: Transitions) -> float:
    """Return the attention threshold with the least SHD, found with the truth in hand."""
    attention = _attention(model, data)
    thresholds = torch.logspace(-3, 0.3, 67).tolist()
    best: float = min(thresholds, key=lambda t: score_graphs(attention > t, data).shd)
    return best


def _attention(model: WorldModel, data: Transitions) -> Tensor:
    model.eval()
    parts = []
    for begin in range(0, len(data), _AT_ONCE):
        part = data[begin : begin + _AT_ONCE]
        parts.append(attention_paths(model(part.states, part.environment, part.mask)))
    return torch.cat(parts)


@torch.no_grad()
def rollout(
    model: WorldModel, states: Tensor, environment: Tensor, mask: Tensor, horizon: int
) -> Tensor:
    """Predict on from predictions, `[B, horizon, N, D]`.

    Args:
        model: A transition model.
        states: `[B, N, F]`.
        environment: Integers `[B]`, or tokens.
        mask: Boolean `[B, N]`.
        horizon: Steps.
    """
    model.eval()
    predicted = []
    for _ in range(horizon):
        following = model(states, environment, mask).states
        predicted.append(following)
        states = torch.cat((following, states[..., following.shape[-1] :]), -1)
    return torch.stack(predicted, 1)


def rollout_error(
    model: WorldModel, trajectories: Transitions, length: int, environment: Tensor | None = None
) -> float:
    """Return the error summed over the steps of trajectories, in the mean of their objects.

    Args:
        model: A transition model.
        trajectories: Consecutive transitions, `length` for each trajectory.
        length: Steps of each.
        environment: Token `[d]` to use in place of the trajectories' own interventions.

    Raises:
        WorldError: The number of transitions is no multiple of the length.
    """
    if length < 1 or len(trajectories) % length:
        raise WorldError(f"{len(trajectories)} transitions are no trajectories of {length} steps.")
    first = trajectories[slice(0, None, length)]
    given = first.environment if environment is None else environment
    predicted = rollout(model, first.states, given, first.mask, length)
    truth = trajectories.following.view_as(predicted)
    distance = (predicted - truth).norm(dim=-1).sum(1)
    return float((distance * first.mask).sum() / first.mask.sum())


@torch.no_grad()
def removal_error_change(model: WorldModel, data: Transitions, graphs: Tensor) -> float:
    """Return by what share the error changes when objects without a path are removed.

    For each object, everything is taken away that has no path to it, nor to an object with a path
    to it, and so on; what is compared is the error of its prediction.

    Args:
        model: A transition model.
        data: Transitions.
        graphs: Which objects have a path to which, boolean `[M, N, N + 1]`.
    """
    model.eval()
    whole, without = 0.0, 0.0
    n = data.states.shape[1]
    for begin in range(0, len(data), _AT_ONCE):
        part = data[begin : begin + _AT_ONCE]
        keep = ancestors(graphs[begin : begin + _AT_ONCE, :, :n])
        before = model(part.states, part.environment, part.mask).states
        for i in range(n):
            mask = part.mask & keep[:, i]
            after = model(part.states, part.environment, mask).states
            there = part.mask[:, i]
            for states, is_before in ((before, True), (after, False)):
                error = ((states[:, i] - part.following[:, i]) / model.scale).square().mean(-1)
                total = float((error * there).sum())
                whole, without = (whole + total, without) if is_before else (whole, without + total)
    return without / whole - 1 if whole else 0.0


def ancestors(edges: Tensor) -> Tensor:
    """Return each object itself, its parents, theirs, and so on, boolean `[M, N, N]`.

    What remains when all others are removed is closed: nothing in it has read of what is gone.
    """
    n = edges.shape[-1]
    found = edges | torch.eye(n, dtype=torch.bool, device=edges.device)
    for _ in range(n.bit_length()):
        found = found.float() @ found.float() > 0
    return found


@torch.no_grad()
def influence_without_path(
    model: TransitionModel, data: Transitions, generator: torch.Generator
) -> tuple[float, float]:
    """Return of how many pairs without a path the sender still has influence.

    Each object in turn is replaced by that of another state.

    Returns:
        The share with the gates held as they were, and with gates that may open in response.
    """
    model.eval()
    n = data.states.shape[1]
    before = model(data.states, data.environment, data.mask)
    paths = reachable(before.adjacency)[..., :n, :n]
    order = torch.randperm(len(data), generator=generator, device=generator.device)
    other = data.states[order.to(data.states.device)]
    held, free, pairs = 0, 0, 0
    for j in range(n):
        states = data.states.clone()
        states[:, j] = other[:, j]
        silent = ~paths[:, :, j] & data.mask & data.mask[:, j : j + 1]
        pairs += int(silent.sum())
        for adjacency in (before.adjacency, None):
            after = model(states, data.environment, data.mask, adjacency=adjacency)
            moved = (after.states != before.states).any(-1) & silent
            if adjacency is None:
                free += int(moved.sum())
            else:
                held += int(moved.sum())
    return held / max(1, pairs), free / max(1, pairs)


def normalised_error(
    model: WorldModel, data: Transitions, environment: Tensor | None = None
) -> float:
    """Return the one-step error in units of σ; with a token in place of the interventions."""
    model.eval()
    given = data.environment if environment is None else environment
    with torch.no_grad():
        prediction = model(data.states, given, data.mask)
    return float(prediction_error(prediction.states, data, model.scale))


def _share(part: Tensor, whole: Tensor) -> float:
    total = int(whole.sum())
    return 1.0 if total == 0 else int((part & whole).sum()) / total
