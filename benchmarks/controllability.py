"""Requested against achieved density: constrained L0 beside penalised L0 with three penalties.

    python benchmarks/controllability.py [--data PATH] [--plot controllability.png]

A small CNN, every weight with a gate, is trained at six densities under a constraint and once for
each penalty. Achieved is the expected density of the gates before the exact selection that ends
every run, and what that selection leaves. --data is a folder with train.parquet and test.parquet of
images; scikit-learn's digits by default.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from torch import nn

import one_run
from spartan.commands.images import ImageData, load_data
from spartan.commands.options.train import TrainConfig

mpl.use("Agg")
import matplotlib.pyplot as plt

TARGETS = (0.8, 0.5, 0.3, 0.1, 0.05, 0.01)
PENALTIES = (0.1, 1.0, 10.0)


def small_cnn(channels: int, image_size: int, classes: int) -> nn.Module:
    """Three convolutions with batch norms, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes),
    )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one run reached.

    Expected density of the gates, units kept in the end and units the budget asks for, accuracy.
    """

    gates: float
    kept: int
    asked: int
    accuracy: float


def run(
    data: ImageData, source: str, epochs: int, method: str, density: float, *args: str
) -> Outcome:
    config = TrainConfig(
        data=source,
        model="controllability:small_cnn",
        method=method,
        method_args=args,
        density=density,
        epochs=epochs,
        checkpoint_every=epochs,
    )
    trainer, row = one_run.train_with(config, data)
    weights = trainer.sparsifier.weights
    kept, units = sum(weight.kept for weight in weights), sum(weight.units for weight in weights)
    gates = trainer.sparsifier.monitor()["expected"]
    return Outcome(gates, kept, round(density * units), row["accuracy"])


def plot(constrained: dict[float, Outcome], penalised: dict[float, Outcome], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5, 4.2), layout="constrained")
    axes.plot(TARGETS, TARGETS, color="0.7", zorder=0, label="requested")
    reached = [constrained[d].gates for d in TARGETS]
    axes.plot(TARGETS, reached, "o", color="C0", label="constrained: gates alone")
    final = [d * constrained[d].kept / constrained[d].asked for d in TARGETS]
    axes.plot(TARGETS, final, "x", color="k", label="constrained: after the exact selection")
    for color, (penalty, outcome) in zip(("C1", "C2", "C3"), penalised.items(), strict=True):
        axes.axhline(outcome.gates, color=color, ls="--", label=f"penalised, λ = {penalty:g}")
    axes.set(xscale="log", yscale="log", xlabel="requested density", ylabel="achieved density")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--images", type=int, default=10_000, help="training images to use")
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--plot", type=Path, default=Path("controllability.png"))
    args = parser.parse_args()
    data = one_run.first_images(load_data(args.data, args.image_size), args.images)
    common = data, args.data, args.epochs
    constrained = {d: run(*common, "constrained-l0", d) for d in TARGETS}
    # The budget of a penalised run shows only in the selection at its end.
    penalised = {p: run(*common, "penalised-l0", 0.1, f"penalty={p}") for p in PENALTIES}
    print("| requested | constrained misses by | kept in the end | accuracy | ", end="")
    print(" | ".join(f"λ = {p:g} misses by" for p in PENALTIES), "|")
    print("|---" * (4 + len(PENALTIES)) + "|")
    for d in TARGETS:
        c = constrained[d]
        missed = " | ".join(f"{penalised[p].gates - d:+.3f}" for p in PENALTIES)
        kept = f"{c.kept:,} of {c.asked:,}"
        print(f"| {d} | {c.gates - d:+.4f} | {kept} | {c.accuracy:.2%} | {missed} |")
    plot(constrained, penalised, args.plot)


if __name__ == "__main__":
    main()
