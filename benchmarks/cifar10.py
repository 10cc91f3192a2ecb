"""Accuracy on CIFAR-10: dense, magnitude, dual averaging and Spartan at 90, 95 and 98 % sparsity.

Every method gets the same recipe, the same seeds and its default settings. Two scales:

    python benchmarks/cifar10.py --data PATH --scale small     about 50 minutes on two cores
    python benchmarks/cifar10.py --data PATH --scale full      ResNet-20, for a GPU

PATH is a folder with train.parquet and test.parquet (columns image, label). The table is printed
at the end and, with every single run, written to the JSON file given by --out.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import one_run
from spartan.training.config import TrainConfig
from spartan.training.data import ImageData, MemoryImages, load_data
from spartan.training.models import resnet20

METHODS = ("magnitude", "dual-averaging", "spartan")
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
    data = load_data(path, scale.image_size)
    assert isinstance(data.train, MemoryImages)
    images = MemoryImages(data.train.images[: scale.images], data.train.labels[: scale.images])
    return replace(data, train=images)


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
        cells = {m: accuracies(m, sparsity) for m in METHODS}
        best = max(cells, key=lambda m: statistics.mean(cells[m]))
        shown = {m: one_run.mean_and_spread(v) for m, v in cells.items()}
        shown[best] = f"**{shown[best]}**"
        lines.append(f"| {sparsity:.0%} | " + " | ".join(shown.values()) + " |")
    dense = one_run.mean_and_spread(accuracies("dense", 0.0))
    return "\n".join([f"dense: {dense}", "", *lines])


def jobs(seeds: int) -> list[Job]:
    # Density 1 under any method is dense training.
    dense = [Job("dense", 0.0, seed) for seed in range(seeds)]
    return dense + [
        Job(method, sparsity, seed)
        for sparsity in SPARSITIES
        for method in METHODS
        for seed in range(seeds)
    ]


def run_named(job: Job, path: str, scale: Scale, threads: int) -> dict[str, object]:
    method = "magnitude" if job.method == "dense" else job.method
    return {**run(replace(job, method=method), path, scale, threads), "method": job.method}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--out", type=Path, default=Path("cifar10_results.json"))
    args = parser.parse_args()
    scale = SCALES[args.scale]
    threads = max(1, torch.get_num_threads() // args.jobs)
    began = time.perf_counter()
    results: list[dict[str, object]] = []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        pending = [
            pool.apply_async(run_named, (job, args.data, scale, threads))
            for job in jobs(scale.seeds)
        ]
        for handle in pending:
            result = handle.get()
            results.append(result)
            print(json.dumps(result), flush=True)
            args.out.write_text(json.dumps(results, indent=1))
    print(f"\n{args.scale} scale, {scale.seeds} seeds, {time.perf_counter() - began:.0f} s\n")
    print(table(results))


if __name__ == "__main__":
    main()
