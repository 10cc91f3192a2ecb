"""Accuracy without the guard of dead outputs, and with smaller or no floors of layers; batch norms.

    python benchmarks/dead_outputs.py

The digits of the league, an MLP 64-256-256-10 with batch norms, three seeds; five minutes. All
columns get the same recipe and seeds, in one run.
"""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from league_tasks import TASKS
from spartan import Budget, Channel
from spartan.budgets.budget import LAYER_FLOOR
from spartan.methods import DPF, DualAveraging, Magnitude, Spartan
from spartan.methods.masking import MaskingMethod
from spartan.weights.patterns import Pattern, Unstructured

CASES: list[tuple[MaskingMethod, Pattern, tuple[float, ...]]] = [
    (Spartan(), Unstructured(), (0.05, 0.02, 0.01)),
    (DualAveraging(), Unstructured(), (0.05, 0.02, 0.01)),
    (DPF(), Unstructured(), (0.05, 0.02, 0.01)),
    (Magnitude(), Unstructured(), (0.05, 0.02, 0.01)),
    (Spartan(), Channel(), (0.3, 0.1)),
]
# Floor, and whether gradients of dead outputs are held.
COLUMNS = {
    "default": (LAYER_FLOOR, True),
    "no guard": (LAYER_FLOOR, False),
    "floor 0.1": (0.1, True),
    "no floor": (0.0, True),
    "neither": (0.0, False),
}
GUARDED = ("spartan", "dual_averaging", "dpf")


def accuracy(
    method: MaskingMethod, pattern: Pattern, density: float, floor: float, guard: bool
) -> float:
    """Return the mean accuracy over seeds, in percent."""
    task = replace(TASKS["digits"], pattern=pattern)
    budget = Budget(density=density, layer_floor=floor)
    module = f"spartan.methods.masking.{method.name.replace('-', '_')}"
    guarded = module.rpartition(".")[2] in GUARDED
    without = mock.patch(f"{module}.hold_dead_outputs") if guarded and not guard else nullcontext()
    with without:
        return statistics.mean(task.run(method, budget, seed, Path()) for seed in range(task.seeds))


def main() -> None:
    torch.set_num_threads(1)
    print("| method | pattern | density | " + " | ".join(COLUMNS) + " |")
    print("|---" * (3 + len(COLUMNS)) + "|")
    for method, pattern, densities in CASES:
        for density in densities:
            cells = [f"{accuracy(method, pattern, density, *c):.2f}" for c in COLUMNS.values()]
            shown = [method.name, str(pattern), f"{density:.0%}", *cells]
            print("| " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()
