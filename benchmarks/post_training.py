"""Post-training sparsity of a pretrained ResNet-20: every method with every allocation.

    python benchmarks/post_training.py --data PATH --weights resnet20.safetensors

PATH is CIFAR-10 as parquet files; the weights are a ResNet-20 in the usual keys, trained by others.
1,024 training images without labels calibrate; accuracy is that of the held-out images, of which
nothing is used before. The whole table takes about an hour and a half on two cores; --methods,
--allocations and --sparsities choose a part. Allocations are found once for all methods that do not
learn them; a time is that of the whole compression, allocation included.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from torch import nn

import spartan
from spartan.commands.accuracy import loss_and_accuracy
from spartan.commands.images import ImageData, augment, load_data, normalize
from spartan.commands.models import resnet20
from spartan.deploy import load
from spartan.post_training import Distillation
from spartan.post_training.allocation import ALLOCATIONS

# What the weights were trained with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
METHODS = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "magnitude + layer": {"method": "magnitude", "reconstruct": "layer"},
    "wanda + layer": {"method": "wanda", "reconstruct": "layer"},
    "sparsegpt + layer": {"method": "sparsegpt", "reconstruct": "layer"},
    "obs": {"method": "obs"},
    "obs + network": {"method": "obs", "reconstruct": "network"},
    "fcpts": {"method": "fcpts"},
    "fcpts-published": {"method": "fcpts-published"},
}


class Task:
    """A trained network, and the images it is calibrated and measured on."""

    def __init__(self, data: str, weights: Path) -> None:
        images = load_data(data)
        self.images = ImageData(**{**vars(images), "mean": MEAN, "std": STD})
        self.model = resnet20(3, 32, 10).eval()
        load(weights, self.model)

    def samples(self, count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.images.train.labels), generator=generator)[:count]
        return normalize(self.images.train.read(order.tolist()), self.images)

    def accuracy(self, model: nn.Module) -> float:
        return 100 * loss_and_accuracy(model, self.images.test, self.images, torch.device("cpu"))[1]

    def change(self, batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return augment(batch, True, generator)


KNOWN: dict[tuple[str, float, int], tuple[dict[str, float], float]] = {}


def allocation_of(
    task: Task, name: str, sparsity: float, seed: int, how: Distillation, samples: int
) -> tuple[dict[str, float], float]:
    """Return the densities of layers, and the seconds that it took to find them."""
    key = name, sparsity, seed
    if key not in KNOWN:
        report = spartan.compress(
            task.model,
            task.samples(samples, seed),
            sparsity=sparsity,
            method="magnitude",
            allocation=name,
            distillation=how,
            seed=seed,
        )
        densities = {layer.name: layer.density for layer in report.layers}
        KNOWN[key] = densities, report.phases["allocation"]
    return KNOWN[key]


def one(
    task: Task,
    method: str,
    allocation: str,
    sparsity: float,
    seed: int,
    how: Distillation,
    options: argparse.Namespace,
) -> tuple[float, float]:
    """Return accuracy and seconds of one compression."""
    before, given = 0.0, allocation
    if not (method.startswith("fcpts") and allocation == "learned"):
        facts = sparsity, seed, how, options.samples
        given, before = allocation_of(task, allocation, *facts)
    report = spartan.compress(
        task.model,
        task.samples(options.samples, seed),
        sparsity=sparsity,
        allocation=given,
        distillation=how,
        minutes=options.minutes,
        seed=seed,
        **METHODS[method],
    )
    assert report.numel - report.nonzero == report.numel - round((1 - sparsity) * report.numel)
    return task.accuracy(report.model), before + report.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--allocations", nargs="+", choices=ALLOCATIONS, default=list(ALLOCATIONS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--minutes", type=float, help="instead of --steps")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    task = Task(options.data, options.weights)
    dense = task.accuracy(task.model)
    how = Distillation(steps=options.steps, augment=task.change)
    print(f"dense {dense:.2f} %; points lost, accuracy, seconds ({options.threads} threads)")
    print(f"{'method':20}{'allocation':12}" + "".join(f"{s:>22.0%}" for s in options.sparsities))
    for method in options.methods:
        for allocation in options.allocations:
            if method == "fcpts-published" and allocation != "learned":
                continue
            print(f"{method:20}{allocation:12}", end="", flush=True)
            for sparsity in options.sparsities:
                found, seconds = [], []
                for seed in range(options.seeds):
                    result = one(task, method, allocation, sparsity, seed, how, options)
                    found.append(result[0])
                    seconds.append(result[1])
                mean = statistics.mean(found)
                spread = f" ±{statistics.stdev(found):.2f}" if len(found) > 1 else ""
                cell = f"{dense - mean:.2f}  {mean:.2f}{spread}  {statistics.mean(seconds):.0f}s"
                print(f"{cell:>22}", end="", flush=True)
            print(flush=True)


if __name__ == "__main__":
    main()
