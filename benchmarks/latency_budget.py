"""Requested against measured time of models pruned with `Budget(latency_ms=…)`.

    python benchmarks/latency_budget.py --threads 1

Prunes the ResNet-18 and the MLP of deploy.py at once to several times, and times the results as
`spartan bench` does. About five minutes.
"""

from __future__ import annotations

import argparse
import copy
import warnings

import torch
from torch import nn

from deploy import mlp, resnet18
from spartan import Budget, Sparsifier
from spartan.commands.bench import bench
from spartan.methods import Magnitude

SHARES = (0.7, 0.5, 0.35)  # of the dense model's time


def deliver(model: nn.Module, budget: Budget) -> nn.Module:
    """Prune a model at once, without training it."""
    delivered = copy.deepcopy(model)
    sparsifier = Sparsifier(
        delivered,
        torch.optim.SGD(delivered.parameters(), lr=0.0),
        method=Magnitude(schedule="one-shot"),
        budget=budget,
        total_steps=1,
    )
    sparsifier.finalize()
    return delivered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print(f"{'model':12}{'batch':>6}{'allocation':>12}{'dense, ms':>11}{'asked, ms':>11}"
          f"{'got, ms':>9}{'got / asked':>13}{'density':>9}")  # fmt: skip
    torch.manual_seed(0)
    for name, model, shape in (
        ("ResNet-18", resnet18().eval(), (1, 3, 32, 32)),
        ("MLP", mlp().eval(), (16, 1024)),
    ):
        batch = shape[0]
        example = {batch: torch.randn(shape)}
        dense = 1e3 * bench(model, example, options.threads)[batch].dense.median
        for allocation in ("global", "uniform"):
            for share in SHARES:
                asked = share * dense
                budget = Budget(
                    latency_ms=asked, example_input=torch.randn(shape), allocation=allocation
                )
                delivered = deliver(model, budget)
                plan = bench(delivered, example, options.threads)[batch]
                got = 1e3 * plan.accelerated.median
                weights = [m.weight for m in delivered.modules() if hasattr(m, "in_channels")]
                weights += [m.weight for m in delivered.modules() if hasattr(m, "in_features")]
                kept = sum(int(w.count_nonzero()) for w in weights)
                density = kept / sum(w.numel() for w in weights)
                print(f"{name:12}{batch:6}{allocation:>12}{dense:11.2f}{asked:11.2f}{got:9.2f}"
                      f"{got / asked:13.2f}{density:9.1%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
