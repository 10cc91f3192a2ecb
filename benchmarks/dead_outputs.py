"""Accuracy with and without holding the gradients of outputs that keep nothing; batch norms.

    python benchmarks/dead_outputs.py

Digits, an MLP 64-256-256-10 with batch norms, SGD 0.1 with a cosine, 30 epochs, three seeds; about
two minutes. Both sides get the same recipe and seeds, in one run.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from sklearn.datasets import load_digits
from torch import nn

from spartan import Budget, Channel, Sparsifier
from spartan.methods import DPF, DualAveraging, Spartan
from spartan.methods.masking import MaskingMethod, dpf, dual_averaging, spartan
from spartan.weights.patterns import Pattern, Unstructured

EPOCHS, BATCH, SEEDS = 30, 64, 3
CASES: list[tuple[MaskingMethod, Pattern, float]] = [
    *((method, Unstructured(), d) for method in (Spartan(), DualAveraging(), DPF())
      for d in (0.05, 0.02)),
    *((Spartan(), Channel(), d) for d in (0.3, 0.1)),
]  # fmt: skip


@contextmanager
def without() -> Iterator[None]:
    """Take the guard out of the methods that have it."""
    names = [f"{module.__name__}.hold_dead_outputs" for module in (spartan, dual_averaging, dpf)]
    with mock.patch(names[0]), mock.patch(names[1]), mock.patch(names[2]):
        yield


def accuracy(method: MaskingMethod, pattern: Pattern, density: float, seed: int) -> float:
    """Train, and return the accuracy on held-out images in percent."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs in (64, 256):
        layers += [nn.Linear(inputs, 256), nn.BatchNorm1d(256), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = EPOCHS * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sparsifier = Sparsifier(model, optimizer, method, Budget(density=density), steps, pattern)
    for _ in range(EPOCHS):
        shuffled = train[torch.randperm(len(train))]
        for some in shuffled[: len(train) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[some]), labels[some]).backward()
            optimizer.step()
            schedule.step()
    sparsifier.finalize()
    right = model.eval()(images[test]).argmax(1) == labels[test]
    return 100 * float(right.float().mean())


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # layers that die are what is measured
    print("method            pattern       density    with  without")
    for method, pattern, density in CASES:
        held = statistics.mean(accuracy(method, pattern, density, s) for s in range(SEEDS))
        with without():
            free = statistics.mean(accuracy(method, pattern, density, s) for s in range(SEEDS))
        row = f"{method.name:17} {pattern!s:13} {density:7.0%} {held:7.2f} {free:8.2f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
