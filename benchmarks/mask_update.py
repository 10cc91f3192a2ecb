"""Cost of one Spartan mask update against the optimizer's step, sort + Sinkhorn, kthvalue and topk.

    python benchmarks/mask_update.py

float32 weights at 5 % density, β at its end value, steady state: the warm starts of the last step
are used, as in training. Times are medians in one process; ratios come first. "Update" is
everything the sparsifier adds to a step: pull-back, latent copies, exact selection, soft masks,
write. SPARTAN_KERNELS=torch measures the torch versions of the kernels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from spartan import Budget, Sparsifier, kernels
from spartan.kernels import ScanRequest, Scores, scan
from spartan.methods import Spartan
from spartan.methods.masking.norm_follows import GRADIENTS

DENSITY = 0.05
BETA = 4.0  # relative, at its end value
SIZES = (10**5, 10**6, 10**7, 25 * 10**6, 10**8)
HEADLINE = 25 * 10**6


Run = Callable[[], object]


def seconds(run: Run, repeats: int, before: Run = lambda: None) -> float:
    times = []
    for _ in range(repeats):
        before()
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


class Weights(nn.Module):
    """Matrices of 1,000 inputs, n weights together."""

    def __init__(self, n: int, count: int = 1) -> None:
        super().__init__()
        rows = n // 1000 // count
        self.layers = nn.ModuleList(nn.Linear(1000, rows, bias=False) for _ in range(count))


def make_step(n: int, count: int, sparse: bool) -> tuple[Run, Run]:
    """Return what renews the gradients, which a step changes in place, and the step."""
    torch.manual_seed(0)
    model = Weights(n, count)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if sparse:
        method = Spartan(beta=(BETA, BETA), warmup=0.0)
        Sparsifier(model, optimizer, method, Budget(density=DENSITY), 10**6)
    gradients = [torch.randn_like(parameter) for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)

    def renew() -> None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(_behind_a_norm(parameter.detach(), gradient))

    for _ in range(GRADIENTS + 2):  # the first ones are looked at more closely
        renew()
        optimizer.step()
    return renew, optimizer.step


def _behind_a_norm(weight: Tensor, gradient: Tensor) -> Tensor:
    """Make a gradient one of a weight that a norm follows: soft masks cost more than hard ones."""
    along = (gradient * weight).sum(1, keepdim=True) / weight.square().sum(1, keepdim=True)
    return gradient - along * weight


def optimizer_steps(n: int, repeats: int, count: int = 1) -> tuple[float, float]:
    """Seconds of a fused AdamW step, and of what the sparsifier's hooks add to it."""
    times = []
    for sparse in (False, True):
        renew, step = make_step(n, count, sparse)
        times.append(seconds(step, repeats, before=renew))
    return times[0], times[1] - times[0]


def sort_and_sinkhorn(weight: Tensor, grad: Tensor, budget: float, beta: float) -> Tensor:
    """Sort all weights, iterate Sinkhorn until the objective moves by 1 %; forward and backward.

    One iteration is μ ← μ + log k - log Σ sigmoid(β(u - τ) + μ). Nothing is carried between steps.
    """
    u = weight.abs().flatten()
    ordered = u.sort(descending=True).values
    threshold = ordered[round(budget)]
    z = beta * (u - threshold)
    mu, before = torch.zeros(()), torch.tensor(torch.inf)
    for _ in range(100):
        mask = torch.sigmoid(z + mu)
        mu = mu + torch.log(torch.tensor(budget)) - torch.log(mask.sum())
        objective = torch.dot(u, mask)
        if abs(objective - before) <= 1e-2 * abs(before):
            break
        before = objective
    mask = torch.sigmoid(z + mu).view_as(weight)
    forward = weight * mask * (weight.abs() >= threshold)
    spread = mask * (1 - mask)
    price = (grad * weight * spread).sum() / spread.sum()
    return forward + mask * grad + weight.sign() * beta * spread * (grad * weight - price)


def selection(n: int, repeats: int) -> None:
    """Print the exact k-th largest magnitude against torch's ways to find it."""
    x = (torch.randn(n) * 0.02).abs()
    k = round(DENSITY * n)
    scores = Scores([x], [1.0], [1.0], absolute=True)
    cold, warm = ScanRequest(scores, k), ScanRequest(scores, k)
    threshold = scan([cold])[0].cutoff.threshold
    assert threshold == x.kthvalue(n - k + 1).values.item()
    # Brackets in training are as wide as the threshold moved in the last step, at most 1 %.
    warm = ScanRequest(scores, k, (threshold * 0.998, threshold * 1.002))
    times = {
        "first (two histograms)": seconds(lambda: scan([cold]), repeats),
        "warm (0.4 % bracket)": seconds(lambda: scan([warm]), repeats),
    }
    kth = seconds(lambda: x.kthvalue(n - k + 1), 3)
    top = seconds(lambda: x.topk(k, sorted=False), 3)
    print(f"\nk-th largest of {n:,}: kthvalue {1e3 * kth:.0f} ms, topk {1e3 * top:.0f} ms")
    print("| selection | kthvalue / it | topk / it | it |")
    print("|---|---|---|---|")
    for name, time_taken in times.items():
        print(
            f"| {name} | {kth / time_taken:.1f} x | {top / time_taken:.1f} x "
            f"| {1e3 * time_taken:.1f} ms |"
        )


def temporary_memory(n: int) -> float:
    """Return how far one step raises the peak of the process's memory, over that of the weights."""
    renew, step = make_step(n, 1, sparse=True)
    renew()
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is there now

    def kilobytes(key: str) -> int:
        return next(
            int(x.split()[1]) for x in status.read_text(encoding="utf-8").splitlines() if key in x
        )

    before = kilobytes("VmRSS")
    step()
    return (kilobytes("VmHWM") - before) * 1024 / (4 * n)


def temporary_memory_apart(n: int) -> str:
    """Measure it in a process whose freed memory goes back at once, so that reuse is seen."""
    code = f"import mask_update; print(mask_update.temporary_memory({n}))"
    heap = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **heap}, cwd=Path(__file__).parent,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return f"{100 * float(done.stdout):.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="*", default=SIZES)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {kernels.backend()}")
    print("| weights | update / AdamW step | Sinkhorn / update | ns a weight | update | AdamW |")
    print("|---|---|---|---|---|---|")
    for size in args.sizes:
        n = int(size)
        dense, update = optimizer_steps(n, args.repeats)
        against = "not measured"
        if n <= HEADLINE:
            weight = torch.randn(n // 1000, 1000) * 0.02
            grad = torch.randn_like(weight)
            # Relative β of 20: the threshold, 1.96 standard deviations, counts as 0.2.
            beta = BETA * 0.2 / (1.96 * 0.02)
            plain = seconds(partial(sort_and_sinkhorn, weight, grad, DENSITY * n, beta), 3)
            against = f"{plain / update:.0f} x ({1e3 * plain:.0f} ms)"
        print(
            f"| {n:,} | {update / dense:.1f} x | {against} | {1e9 * update / n:.2f} "
            f"| {1e3 * update:.1f} ms | {1e3 * dense:.1f} ms |",
            flush=True,
        )
    n = int(max(size for size in args.sizes if size <= HEADLINE))
    one, many = (optimizer_steps(n, args.repeats, count)[1] for count in (1, 250))
    print(f"\n{many / one:.2f} x: {n:,} weights in 250 tensors over one tensor")
    print(f"{temporary_memory_apart(n)} of the weights' memory is needed on top in a step")
    selection(n, args.repeats)


if __name__ == "__main__":
    main()
