"""Cost of one Spartan mask update against the optimizer's step and against sort + Sinkhorn.

    python benchmarks/mask_update.py

One weight matrix of n float32 weights at 5 % density, β at its end value, steady state. Times are
medians over repeats in one process; ratios come first. "Update" is everything the sparsifier adds
to a step: pull-back, latent copies, exact selection, soft masks, write.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from spartan import Budget, Sparsifier
from spartan.methods import Spartan

DENSITY = 0.05
SIZES = (10**5, 10**6, 10**7, 3 * 10**7)


def seconds(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


class OneWeight(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.layer = nn.Linear(1000, n // 1000, bias=False)


def optimizer_steps(n: int, repeats: int) -> tuple[float, float]:
    """Seconds of a fused AdamW step without and with the sparsifier's hooks."""
    results = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = OneWeight(n)
        weight = model.layer.weight
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if sparse:
            Sparsifier(model, optimizer, Spartan(warmup=0.0), Budget(density=DENSITY), 10**6)
        weight.grad = torch.randn_like(weight)
        for _ in range(2):
            optimizer.step()
        results.append(seconds(optimizer.step, repeats))
    return results[0], results[1]


def sort_and_sinkhorn(weight: Tensor, grad: Tensor, budget: float, beta: float) -> Tensor:
    """Sort all weights, then iterate the fixed point 100 times; forward and backward.

    The iteration μ ← μ + log k - log Σ sigmoid(β(u - τ) + μ) is what Sinkhorn with two sinks does.
    """
    u = weight.abs().flatten()
    ordered = u.sort(descending=True).values
    z = beta * (u - ordered[round(budget)])
    mu = torch.zeros(())
    for _ in range(100):
        mass = torch.sigmoid(z + mu).sum()
        mu = mu + torch.log(torch.tensor(budget)) - torch.log(mass)
    mask = torch.sigmoid(z + mu).view_as(weight)
    forward = weight * mask * (weight.abs() >= ordered[round(budget)])
    spread = mask * (1 - mask)
    price = (grad * weight * spread).sum() / spread.sum()
    return forward + mask * grad + weight.sign() * beta * spread * (grad * weight - price)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="*", default=SIZES)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| weights | update / AdamW step | Sinkhorn / update | update | AdamW | Sinkhorn |")
    print("|---|---|---|---|---|---|")
    for size in args.sizes:
        n = int(size)
        dense, sparse = optimizer_steps(n, args.repeats)
        update = sparse - dense
        weight = torch.randn(n // 1000, 1000) * 0.02
        grad = torch.randn_like(weight)
        plain = seconds(partial(sort_and_sinkhorn, weight, grad, DENSITY * n, 500.0), 1)
        print(
            f"| {n:,} | {update / dense:.1f} x | {plain / update:.1f} x | {1e3 * update:.1f} ms "
            f"| {1e3 * dense:.1f} ms | {1e3 * plain:.0f} ms |",
            flush=True,
        )


if __name__ == "__main__":
    main()
