"""Channels removed: accuracy, purged size, FLOPs and speed at channel densities 0.5 and 0.3.

    python benchmarks/structured.py --data PATH

A ResNet-20 one and a half times as wide, on CIFAR-10 images of 16 x 16, is trained dense and with
each method. Units are outputs of each convolution, or with constrained L0 inputs, for its gates
must not stand before a batch norm. What is left is purged and timed against the dense network with
its batch norms folded, in one process and on one thread; medians.
"""

from __future__ import annotations

import argparse
import multiprocessing
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn

import one_run
import spartan
from spartan.budgets.flops import trace_flops
from spartan.commands.images import ImageData, load_data
from spartan.commands.models import resnet20
from spartan.commands.options.train import TrainConfig
from spartan.deploy.timing import time_side_by_side
from spartan.weights.prunable import find_prunable

IMAGES, IMAGE_SIZE = 10_240, 16
DENSITIES = (0.5, 0.3)
BATCHES = (1, 16)


def wide_resnet20(channels: int, image_size: int, classes: int) -> nn.Module:
    """ResNet-20 with 24, 48 and 96 channels."""
    return resnet20(channels, image_size, classes, width=24)


@dataclass(frozen=True)
class Job:
    """One training run."""

    method: str
    pattern: str
    allocation: str
    density: float


METHODS = (
    ("magnitude", "channel", "uniform"),
    ("spartan", "channel", "uniform"),
    ("magnitude", "input-channel", "uniform"),
    ("spartan", "input-channel", "uniform"),
    ("constrained-l0", "input-channel", "global"),
)
JOBS = [
    Job("magnitude", "channel", "uniform", 1.0),
    *(Job(*method, density) for density in DENSITIES for method in METHODS),
]


@cache
def load(path: str) -> ImageData:
    return one_run.first_images(load_data(path, IMAGE_SIZE), IMAGES)


def train(job: Job, path: str, epochs: int) -> tuple[nn.Module, float]:
    torch.set_num_threads(1)
    # The classes' outputs and the image's inputs are not channels that one could do without.
    fixed = "conv1.weight" if job.pattern == "input-channel" else "linear.weight"
    config = TrainConfig(
        data=path,
        model="structured:wide_resnet20",
        method=job.method,
        pattern=job.pattern,
        allocation=job.allocation,
        density=job.density,
        exclude=(fixed,),
        epochs=epochs,
        checkpoint_every=epochs,
    )
    trainer, row = one_run.train_with(config, load(path))
    return trainer.model, row["accuracy"]


def flops(model: nn.Module, x: torch.Tensor) -> float:
    """FLOPs of all convolutions and linear layers."""
    weights = find_prunable(model)
    costs = trace_flops(model, weights, x)
    return sum(w.parameter.numel() * cost for w, cost in zip(weights, costs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        pending = [pool.apply_async(train, (job, args.data, args.epochs)) for job in JOBS]
        results = [handle.get() for handle in pending]
    torch.set_num_threads(1)
    one = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    dense = spartan.purge(results[0][0].eval(), one)
    size = sum(p.numel() for p in dense.parameters())
    work = flops(dense, one)
    speeds = " | ".join(f"batch {batch}" for batch in BATCHES)
    print(f"| method | units | density | accuracy | parameters | FLOPs | {speeds} |")
    print("|---" * (6 + len(BATCHES)) + "|")
    for job, (model, accuracy) in zip(JOBS, results, strict=True):
        purged = spartan.purge(model.eval(), one)
        kept = sum(p.numel() for p in purged.parameters())
        cells = [job.method, job.pattern, f"{job.density:g}", f"{accuracy:.2%}"]
        cells += [f"{kept:,} ({kept / size:.1%})", f"{flops(purged, one) / work:.1%}"]
        for batch in BATCHES:
            x = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE)
            with torch.inference_mode():
                slow, fast = time_side_by_side([partial(dense, x), partial(purged, x)], 2.0)
            cells.append(f"{slow.median / fast.median:.2f}x ({1e3 * fast.median:.2f} ms)")
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
