"""False edges of a sparse world model: what their gates cost, and what elimination leaves.

    python benchmarks/world_gates.py FOLDER

FOLDER is a run of `spartan world train` (or of benchmarks/world_model.py). Printed are, on fresh
states,

1. the error with the gates as learned, and with all reads between objects closed that are
   no true edge;
2. what single gates are worth: the error with one closed less the error with it open, the other
   gates as they are, for true edges, and for false reads by distance;
3. wrong edges per state of the gates as learned, of what backward elimination leaves of them, and
   when the first layer's gates of a new model of the same size are fitted to the true edges
   instead, by logistic regression, true edges counted once and 17 times.

Of a refined run 1 and 2 are of the model it was refined from, and then of the refined one. One or
two minutes on one core.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from spartan.commands.world.job import WorldJob, WorldRun, draw_natural
from spartan.world_model import (
    Transitions,
    constant_graph,
    eliminate,
    found_graphs,
    read_graph,
    score_graphs,
)
from spartan.world_model.metrics import true_graphs
from spartan.world_model.model import TransitionModel
from spartan.world_model.toggling import squared_errors

STATES, STEPS, BATCH = 3000, 6000, 128
PRICE = 0.03  # of elimination


def errors(model: TransitionModel, data: Transitions, gates: Tensor) -> Tensor:
    """Return the summed error of each state under given gates."""
    said = model(data.states, data.environment, data.mask, adjacency=gates).states
    return squared_errors(said, data, model.scale).sum(-1)


def show_reads(model: TransitionModel, data: Transitions) -> None:
    """Print what closing all false reads does, and what single gates are worth."""
    count = data.states.shape[1]
    gates = model(data.states, data.environment, data.mask).adjacency
    true = true_graphs(data)
    own = torch.eye(count, dtype=torch.bool)
    needless = ~true[..., :count] & ~own
    allowed = torch.ones_like(gates[0])
    allowed[:, :count, :count] -= needless.float()
    there = data.mask.sum()
    usual = errors(model, data, gates)
    print(f"error, gates as learned          {float(usual.sum() / there):.4f}")
    for layer in range(len(gates)):
        closed = gates.clone()
        closed[layer] *= allowed
        changed = float(errors(model, data, closed).sum() / there)
        false = gates[layer, :, :count, :count] * needless
        reads = float(false.sum() / len(data))
        print(f"  false reads of layer {layer + 1} closed  {changed:.4f}  ({reads:.3f} per state)")
    busiest = int(gates[..., :count, :count].sum((1, 2, 3)).argmax())
    print(f"one gate of layer {busiest + 1} closed, the others as learned; per state:")
    worth = torch.zeros(len(data), count, count)
    for i in range(count):
        for j in range(count):
            closed = gates.clone()
            closed[busiest, :, i, j] = 0
            worth[:, i, j] = errors(model, data, closed) - usual
    show_worth(worth, gates[busiest, :, :count, :count].bool() & ~own, true[..., :count], data)


def show_worth(worth: Tensor, opened: Tensor, true: Tensor, data: Transitions) -> None:
    """Print what open gates are worth: of true edges, and of false reads by distance."""
    places = data.states[..., :2]
    distance = torch.cdist(places, places)

    def row(title: str, which: Tensor) -> None:
        if not bool(which.any()):
            return
        values = worth[which]
        harmful = float((values < 0).float().mean())
        print(
            f"  {title:26} {float(which.sum()) / len(data):7.3f} reads, worth "
            f"{float(values.mean()):8.4f} in the mean, {harmful:4.0%} do harm"
        )

    row("true edges", opened & true)
    bounds = [0.0, 0.2, 0.4, 0.6, 0.8, 1.2, math.inf]
    for low, high in pairwise(bounds):
        between = (distance >= low) & (distance < high)
        row(f"false, distance {low} to {high}", opened & ~true & between)


def fit_gates(job: WorldJob, weight: float, seed: int) -> TransitionModel:
    """Fit a new model's first gates to the true edges.

    Args:
        job: Of the run.
        weight: Of an edge that is there; others weigh 1.
        seed: Of weights and batches.
    """
    torch.manual_seed(seed)
    config = replace(job.config.model_config("sparse"), layers=1)
    model, data = TransitionModel(config), job.data
    block: Any = model.blocks[0]
    attention, objects = block.attention, data.states.shape[1]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    other = ~torch.eye(objects, dtype=torch.bool)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (1 - step / STEPS) / 0.6)
        batch = data[torch.randint(len(data), (BATCH,))]
        tokens = model.tokeniser(batch.states)
        q, k, _ = attention.query_key_value(attention.norm(tokens)).chunk(3, -1)
        logits = q @ k.transpose(-2, -1) / math.sqrt(config.width)
        pairs = batch.mask.unsqueeze(-1) & batch.mask.unsqueeze(-2) & other
        edges = true_graphs(batch)[..., :objects][pairs].float()
        loss = binary_cross_entropy_with_logits(
            logits[pairs], edges, 1 + (weight - 1) * edges, reduction="sum"
        )
        optimizer.zero_grad()
        (loss / BATCH).backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    world, config = WorldRun.open(options.folder)
    job = WorldJob(replace(config, device="cpu"))
    data = draw_natural(job.environment, STATES, torch.Generator().manual_seed(config.seed + 2000))
    print(f"== {config.env}, seed {config.seed}, {len(data)} states")
    found = {}
    for name in [n for n in ("unrefined", "sparse") if n in job.names]:
        model = world.model(name).eval()
        assert isinstance(model, TransitionModel)
        print(f"{name} model")
        with torch.no_grad():
            show_reads(model, data)
        found[name] = found_graphs(model, data)
        left = read_graph(eliminate(model, data, PRICE)[0])
        found[f"{name}, what elimination leaves"] = torch.cat(
            (left.edges, left.targets.unsqueeze(-1)), -1
        )
    for weight in (1.0, 17.0):
        fitted = fit_gates(job, weight, config.seed)
        found[f"fitted to true edges, ×{weight:.0f}"] = found_graphs(fitted, data)
    found["best constant graph"] = constant_graph(data)
    print("gates                                wrong edges  precision  recall")
    for title, graphs in found.items():
        scores = score_graphs(graphs, data)
        print(f"{title:36} {scores.shd:11.3f}  {scores.precision:9.3f}  {scores.recall:6.3f}")


if __name__ == "__main__":
    main()
