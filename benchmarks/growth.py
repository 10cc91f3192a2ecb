"""Accuracy of the growth methods on CIFAR-10 at 98 % sparsity, with one recipe for all.

    python benchmarks/growth.py --data PATH

PATH is a folder with train.parquet and test.parquet. The models are an MLP with two hidden layers
of 1,024 units, trained on 10,240 images of 16 x 16 and on all 50,000, and the ResNet of `cifar10.py
--scale small` on 10,240, all for 20 epochs. Every method replaces 30 % of the connections at first,
and less along a cosine, 48 times in the first three quarters of the run, one budget for all layers.
Every single run is written to the JSON file given by --out; runs that are there already are not
done again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cifar10
import one_run
from spartan.commands.models import mlp

METHODS = ("static", "set", "rigl", "gse")
SPARSITY = 0.98
SEEDS = 3


@dataclass(frozen=True)
class Task:
    """A model, on how many images it is trained, and the steps between two updates."""

    factory: str
    images: int
    period: int


TASKS = {
    "MLP, 10,240 images": Task("growth:wide_mlp", 10_240, 25),
    "MLP, 50,000 images": Task("growth:wide_mlp", 50_000, 122),
    "ResNet-20, three quarters as wide, 10,240 images": Task("cifar10:narrow_resnet20", 10_240, 25),
}


def wide_mlp(channels: int, image_size: int, classes: int) -> nn.Module:
    """Return an MLP with two hidden layers of 1,024 units."""
    return mlp(channels, image_size, classes, width=1024)


def run(name: str, method: str, seed: int, path: str) -> dict[str, Any]:
    task, small = TASKS[name], cifar10.SCALES["small"]
    scale = cifar10.Scale(task.factory, small.image_size, task.images, small.epochs, SEEDS)
    recipe = ("fraction=0.3", f"period={task.period}", "end=0.75", f"seed={seed}")
    job = cifar10.Job(method, SPARSITY, seed, () if method == "static" else recipe)
    return {**cifar10.run(job, path, scale, threads=1), "task": name}


def table(results: list[dict[str, Any]]) -> str:
    """Accuracy in percent, mean and standard deviation over seeds."""
    lines = ["| | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for task in TASKS:
        row = [[r for r in results if (r["task"], r["method"]) == (task, m)] for m in METHODS]
        cells = [one_run.mean_and_spread([r["accuracy"] for r in runs]) for runs in row if runs]
        if len(cells) == len(METHODS):
            lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--out", type=Path, default=Path("growth_results.json"))
    args = parser.parse_args()
    results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    done = {(r["task"], r["method"], r["seed"]) for r in results}
    wanted = [(x, m, s) for x in TASKS for s in range(SEEDS) for m in args.methods]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        pending = [pool.apply_async(run, (*job, args.data)) for job in wanted if job not in done]
        for handle in pending:
            results.append(handle.get())
            print(json.dumps(results[-1]), flush=True)
            args.out.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
