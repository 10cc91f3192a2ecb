"""Accuracy on CIFAR-10: dense and every method at 90, 95 and 98 % sparsity.

Every method gets the same recipe, the same seeds and its default settings. Two scales:

    python benchmarks/cifar10.py --data PATH --scale small     about two minutes a run on a core
    python benchmarks/cifar10.py --data PATH --scale full      ResNet-20, for a GPU

PATH is a folder with train.parquet and test.parquet (columns image, label). The table is printed
at the end. Every single run is written to the JSON file given by --out; runs that are there already
are not done again, so that --methods can do a few at a time.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import one_run
from spartan.commands.images import ImageData, load_data
from spartan.commands.models import resnet20
from spartan.commands.options.train import TrainConfig

METHODS = (
    *("magnitude", "dpf", "powerpropagation"),
    *("dual-averaging", "spartan", "constrained-l0"),
)
SPARSITIES = (0.9, 0.95, 0.98)


@dataclass(frozen=True)
class Scale:
    """One size of the benchmark."""

    model: str
    image_size: int
    images: int
    epochs: int
    seeds: int


SCALES = {
    # A ResNet-20 three quarters as wide, on half-size images.
    "small": Scale("cifar10:narrow_resnet20", 16, 10_240, 20, 3),
    "full": Scale("resnet20", 32, 50_000, 160, 3),
}


def narrow_resnet20(channels: int, image_size: int, classes: int) -> nn.Module:
    """ResNet-20 with 12, 24 and 48 channels."""
    return resnet20(channels, image_size, classes, width=12)


@dataclass(frozen=True)
class Job:
    """One training run."""

    method: str
    sparsity: float
    seed: int
    settings: tuple[str, ...] = ()


@functools.cache
def load(path: str, scale: Scale) -> ImageData:
    return one_run.first_images(load_data(path, scale.image_size), scale.images)


def run(job: Job, path: str, scale: Scale, threads: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    config = TrainConfig(
        data=path,
        model=scale.model,
        method=job.method,
        method_args=job.settings,
        sparsity=job.sparsity,
        epochs=scale.epochs,
        seed=job.seed,
        checkpoint_every=scale.epochs,
    )
    began = time.perf_counter()
    row = one_run.train(config, load(path, scale))
    return {
        "method": job.method,
        "sparsity": job.sparsity,
        "seed": job.seed,
        "settings": job.settings,
        "accuracy": row["accuracy"],
        "density": row["density"],
        "seconds": time.perf_counter() - began,
    }


def table(results: list[dict[str, object]]) -> str:
    """Accuracy in percent, mean and standard deviation over seeds; the best of each row marked."""

    def accuracies(method: str, sparsity: float) -> list[float]:
        return [
            float(str(r["accuracy"]))
            for r in results
            if r["method"] == method and r["sparsity"] == sparsity
        ]

    lines = ["| sparsity | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for sparsity in SPARSITIES:
        if not any(r["sparsity"] == sparsity for r in results):
            continue
        cells = {m: accuracies(m, sparsity) for m in METHODS}
        best = max((m for m in METHODS if cells[m]), key=lambda m: statistics.mean(cells[m]))
        shown = {m: one_run.mean_and_spread(v) if v else "" for m, v in cells.items()}
        shown[best] = f"**{shown[best]}**"
        lines.append(f"| {sparsity:.0%} | " + " | ".join(shown.values()) + " |")
    dense = accuracies("dense", 0.0)
    first = [f"dense: {one_run.mean_and_spread(dense)}", ""] if dense else []
    return "\n".join([*first, *lines])


def jobs(seeds: int, methods: Sequence[str]) -> list[Job]:
    return [
        Job(method, sparsity, seed)
        for seed in range(seeds)
        for method in methods
        # Density 1 under any method is dense training.
        for sparsity in (SPARSITIES if method != "dense" else (0.0,))
    ]


def run_named(job: Job, path: str, scale: Scale, threads: int) -> dict[str, object]:
    method = "magnitude" if job.method == "dense" else job.method
    return {**run(replace(job, method=method), path, scale, threads), "method": job.method}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    choices = ("dense", *METHODS)
    parser.add_argument("--methods", nargs="+", choices=choices, default=choices)
    parser.add_argument("--out", type=Path, default=Path("cifar10_results.json"))
    args = parser.parse_args()
    scale = SCALES[args.scale]
    threads = max(1, torch.get_num_threads() // args.jobs)
    began = time.perf_counter()
    results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    done = {(r["method"], r["sparsity"], r["seed"]) for r in results}
    wanted = [
        job
        for job in jobs(scale.seeds, args.methods)
        if (job.method, job.sparsity, job.seed) not in done
    ]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        pending = [pool.apply_async(run_named, (job, args.data, scale, threads)) for job in wanted]
        for handle in pending:
            result = handle.get()
            results.append(result)
            print(json.dumps(result), flush=True)
            args.out.write_text(json.dumps(results, indent=1))
    print(f"\n{args.scale} scale, {scale.seeds} seeds, {time.perf_counter() - began:.0f} s\n")
    print(table(results))


if __name__ == "__main__":
    main()
