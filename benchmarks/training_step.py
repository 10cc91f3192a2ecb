"""Whole training step with a sparsifier over a dense one: a ResNet-20 and a transformer.

    python benchmarks/training_step.py

ResNet-20: batch 128, 32 x 32 images, SGD. Transformer: 6 layers of width 512, 16 x 128 tokens,
AdamW. Each layer has a budget of its own. Dense and sparse steps alternate in one process, so that
whatever else the machine does meets both; the ratio of medians comes first.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spartan import Budget, Sparsifier, kernels
from spartan.commands.models import resnet20
from spartan.methods import METHODS, create
from spartan.methods.masking import MaskingMethod
from spartan.methods.masking.norm_follows import GRADIENTS

MASKING = [
    name
    for name, method in METHODS.items()
    if issubclass(method, MaskingMethod) and method.finds_masks
]
Step = Callable[[], None]


def images(method: str | None) -> Step:
    torch.manual_seed(0)
    model = resnet20(3, 32, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    x, y = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
    return make_step(model, optimizer, method, lambda: F.cross_entropy(model(x), y))


def text(method: str | None) -> Step:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randn(16, 128, 512)
    return make_step(model, optimizer, method, lambda: model(tokens).square().mean())


def make_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, method: str | None,
    loss: Callable[[], Tensor],
) -> Step:  # fmt: skip
    if method is not None:
        fields = {field.name for field in dataclasses.fields(METHODS[method])}
        settings = {"warmup": 0.0} if "warmup" in fields else {}
        kind = METHODS[method]
        rates_only = issubclass(kind, MaskingMethod) and kind.rates_only
        allocation = "global" if rates_only else "uniform"
        budget = Budget(density=0.05, allocation=allocation)
        Sparsifier(model, optimizer, create(method, **settings), budget, 10**6)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def measure(title: str, make: Callable[[str | None], Step], repeats: int) -> None:
    names: list[str | None] = [None, *MASKING]
    steps = {name: make(name) for name in names}
    times: dict[str | None, list[float]] = {name: [] for name in names}
    warm_up = GRADIENTS + 2  # Spartan looks at the first gradients more closely
    for repeat in range(repeats + warm_up):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if repeat >= warm_up:
                times[name].append(time.perf_counter() - began)
    dense = statistics.median(times[None])
    print(f"{title}: dense {1e3 * dense:.0f} ms")
    for name in names[1:]:
        sparse = statistics.median(times[name])
        print(f"  {sparse / dense:.3f} x dense  {name} ({1e3 * (sparse - dense):+.1f} ms)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {kernels.backend()}")
    measure("ResNet-20, batch 128", images, args.repeats)
    measure("transformer, 16 x 128 tokens", text, args.repeats // 2)


if __name__ == "__main__":
    main()
