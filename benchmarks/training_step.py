"""Whole training step with a sparsifier over a dense one: ResNet-20, batch 128, 32 x 32 images.

    python benchmarks/training_step.py

Dense and sparse steps alternate in one process, so that whatever else the machine does meets
both; the ratio of medians comes first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from spartan import Budget, Sparsifier
from spartan.methods import METHODS, create
from spartan.training.models import resnet20


def make_step(method: str | None) -> Callable[[], None]:
    torch.manual_seed(0)
    model = resnet20(3, 32, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    if method is not None:
        settings = {} if method == "magnitude" else {"warmup": 0.0}
        Sparsifier(model, optimizer, create(method, **settings), Budget(density=0.05), 10**6)
    x, y = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    names: list[str | None] = [None, *(name for name in METHODS if name != "fixed")]
    steps = {name: make_step(name) for name in names}
    times: dict[str | None, list[float]] = {name: [] for name in names}
    for repeat in range(args.repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - began)
    dense = statistics.median(times[None])
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, dense {1e3 * dense:.0f} ms"
    )
    for name in names[1:]:
        sparse = statistics.median(times[name])
        print(f"{sparse / dense:.3f} x dense  {name} ({1e3 * (sparse - dense):+.1f} ms)")


if __name__ == "__main__":
    main()
