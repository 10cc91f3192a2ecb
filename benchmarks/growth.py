"""Accuracy of the growth methods on CIFAR-10 at 98 % sparsity, with one recipe for all.

    python benchmarks/growth.py --data PATH

PATH is a folder with train.parquet and test.parquet. The models are an MLP of two hidden layers of
1,024 units and the ResNet of `cifar10.py --scale small`, at that scale: 10,240 images of 16 x 16,
20 epochs. Every method replaces 30 % of the connections at first, and less along a cosine, every 25
of 1,600 steps up to three quarters of the run, one budget for all layers. Every single run is
written to the JSON file given by --out; runs that are there already are not done again. On Linux,

    GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4000000000:glibc.malloc.trim_threshold=8000000000

keeps the memory of the unfolded images between steps, which halves the time of the ResNet.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cifar10
import one_run
from spartan.training.models import mlp

METHODS = ("static", "set", "rigl", "dst-ee", "gse")
SPARSITY = 0.98
SEEDS = 3
RECIPE = ("fraction=0.3", "period=25", "end=0.75")
MODELS = {"MLP": "growth:wide_mlp", "ResNet-20, three quarters as wide": "cifar10:narrow_resnet20"}


def wide_mlp(channels: int, image_size: int, classes: int) -> nn.Module:
    """Return an MLP with two hidden layers of 1,024 units."""
    return mlp(channels, image_size, classes, width=1024)


def run(model: str, method: str, seed: int, path: str) -> dict[str, Any]:
    small = cifar10.SCALES["small"]
    scale = cifar10.Scale(MODELS[model], small.image_size, small.images, small.epochs, small.seeds)
    settings = () if method == "static" else (*RECIPE, f"seed={seed}")
    job = cifar10.Job(method, SPARSITY, seed, settings)
    return {**cifar10.run(job, path, scale, threads=1), "model": model}


def table(results: list[dict[str, Any]]) -> str:
    """Accuracy in percent, mean and standard deviation over seeds."""
    lines = ["| model | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for model in MODELS:
        row = [[r for r in results if (r["model"], r["method"]) == (model, m)] for m in METHODS]
        cells = [one_run.mean_and_spread([r["accuracy"] for r in runs]) for runs in row if runs]
        if len(cells) == len(METHODS):
            lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--out", type=Path, default=Path("growth_results.json"))
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else []
    done = {(r["model"], r["method"], r["seed"]) for r in results}
    wanted = [(x, m, s) for x in MODELS for s in range(SEEDS) for m in args.methods]
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
