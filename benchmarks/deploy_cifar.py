"""A CIFAR-10 network from training to deployment: accuracy, bytes and milliseconds.

    python benchmarks/deploy_cifar.py --data PATH --out runs/deploy

PATH is a folder with train.parquet and test.parquet. Trains a ResNet-20 three times as wide, dense
and at 95 % sparsity, with `spartan train`; packs, loads and times the results with the commands a
user would type. About half an hour on two cores; runs that are there already are not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from torch import nn

from spartan.commands.models import resnet20

SPARSITY = 0.95
BATCHES = (1, 16)


def wide_resnet20(channels: int, image_size: int, classes: int) -> nn.Module:
    """ResNet-20 with 48, 96 and 192 channels."""
    return resnet20(channels, image_size, classes, width=48)


def spartan(*words: object) -> str:
    """Run a command and return what it prints."""
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": here, "COLUMNS": "200"}
    command = [sys.executable, "-m", "spartan", *map(str, words)]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout


def train(data: Path, out: Path, density: float, epochs: int) -> None:
    if (out / "model.safetensors").exists():
        return
    spartan(
        *("train", "--data", data, "--model", "deploy_cifar:wide_resnet20", "--image-size", 16),
        *("--method", "spartan", "--density", density, "--epochs", epochs, "--out", out),
    )


def accuracy(*words: object) -> float:
    printed = spartan("evaluate", *words)
    return float(printed.partition("accuracy ")[2].partition("%")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/deploy"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    dense, sparse = options.out / "dense", options.out / "sparse"
    train(options.data, dense, 1.0, options.epochs)
    train(options.data, sparse, round(1 - SPARSITY, 4), options.epochs)
    packed = options.out / "sparse.packed.safetensors"
    print(spartan("pack", sparse, packed).splitlines()[-1])
    spartan(
        *("bench", sparse, "--weights", packed, "--threads", options.threads),
        *("--batch", *BATCHES, "--out", options.out / "bench"),
    )
    plans = json.loads((options.out / "bench" / "bench.json").read_text(encoding="utf-8"))
    rows = {
        "accuracy, %": (
            accuracy(dense),
            accuracy(sparse, "--weights", packed, "--accelerated"),
        ),
        "bytes": ((dense / "model.safetensors").stat().st_size, packed.stat().st_size),
    }
    for batch in BATCHES:
        plan = plans[str(batch)]
        times = (1e3 * plan[side]["median"] for side in ("dense", "accelerated"))
        rows[f"ms, batch {batch}"] = tuple(times)
    print(f"{'':16}{'dense':>14}{f'{SPARSITY:.0%} sparse':>14}{'ratio':>8}")
    for name, (a, b) in rows.items():
        ratio = "" if name.startswith("acc") else f"{a / b:.2f}"
        print(f"{name:16}{a:14,.2f}{b:14,.2f}{ratio:>8}")


if __name__ == "__main__":
    main()
