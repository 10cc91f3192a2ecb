"""Time and memory of always-sparse training against dense and stock sparse torch.

    python benchmarks/always_sparse.py [--plot PATH] [--data PATH]

Four tables, each with both sides measured in one run, the sides taking turns, medians:

* one step of a square layer, forward and both gradients, batch 128: against dense torch, against
  autograd over `torch.sparse.mm` with a CSR parameter, and against the best composition of torch
  operators (both orders of the connections kept, `sampled_addmm`); inside a chain of sparse layers
  and with rows of samples in and out;
* two threads against one;
* the time of an update of the connections in steps, and the peak memory of steps (on Linux), less
  the activations, per connection;
* with --data, a folder with train.parquet and test.parquet of CIFAR-10: the whole training loop of
  an MLP 3072-4096-4096-10 at 99 % sparsity against the same MLP, dense.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import spartan
from spartan import kernels
from spartan.always_sparse import SparseLinear, convert
from spartan.kernels.dispatch import native_module
from spartan.methods import GSE

BATCH = 128
WIDTHS = (1024, 4096, 16384, 65536)
PER_UNIT = (10, 32, 100)
DENSE_UP_TO = 16384

warnings.filterwarnings("ignore")


def medians(*sides: Callable[[], object], seconds: float = 1.0) -> list[float]:
    """Time callables in turns; return the median seconds of each.

    A turn is as many calls in a row as take a twentieth of a second, as in a training loop: after
    another side has been at work, the first call finds nothing of its own in the caches.
    """
    calls = []
    for side in sides:
        side()
        began = time.perf_counter()
        side()
        calls.append(max(1, int(0.05 / (time.perf_counter() - began))))
    times: list[list[float]] = [[] for _ in sides]
    began = time.perf_counter()
    while len(times[0]) < 3 or time.perf_counter() - began < seconds * len(sides):
        for side, count, found in zip(sides, calls, times, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                side()
            found.append((time.perf_counter() - start) / count)
    return [statistics.median(found) for found in times]


@dataclass(frozen=True)
class Layer:
    """A square layer, with activations and gradients in which samples are neighbours."""

    layer: SparseLinear
    x: Tensor
    dy: Tensor

    @classmethod
    def make(cls, width: int, per_unit: int, batch: int = BATCH) -> Layer:
        torch.manual_seed(0)
        layer = SparseLinear(width, width, bias=False, connections_per_unit=per_unit)
        x, dy = torch.randn(2, width, batch)
        return cls(layer, x.t().requires_grad_(), dy.t())

    def step(self) -> object:
        return torch.autograd.grad(self.layer(self.x), (self.x, self.layer.values), self.dy)

    def by_rows(self) -> Callable[[], object]:
        """Return the step with samples and gradients in rows, as dense layers have them."""
        x, dy = self.x.detach().contiguous().requires_grad_(), self.dy.contiguous()
        return Layer(self.layer, x, dy).step

    def by_torch_operators(self) -> object:
        with kernels.using("torch"):
            return self.step()

    def stock(self) -> Callable[[], object]:
        graph, width = self.layer.connections, self.layer.in_features
        values = self.layer.values.detach().clone()
        w = torch.sparse_csr_tensor(graph.starts, graph.columns, values, (width, width))
        w.requires_grad_()
        x, dy = self.x.detach().t().contiguous().requires_grad_(), self.dy.t().contiguous()
        return lambda: torch.autograd.grad(torch.sparse.mm(w, x), (x, w), dy)


def dense_step(width: int) -> Callable[[], object]:
    x, dy = torch.randn(BATCH, width, requires_grad=True), torch.randn(BATCH, width)
    w = torch.randn(width, width, requires_grad=True)
    return lambda: torch.autograd.grad(nn.functional.linear(x, w), (x, w), dy)


def steps_table(threads: int) -> dict[tuple[int, int], dict[str, float]]:
    torch.set_num_threads(threads)
    print(f"\n{threads} thread(s), batch {BATCH}, float32, kernels {kernels.backend()}\n")
    print(
        "| width | per unit | dense / ours | stock / ours | torch operators / ours | ours | rows |"
    )
    print("|---" * 7 + "|")
    found: dict[tuple[int, int], dict[str, float]] = {}
    for width in WIDTHS:
        dense = medians(dense_step(width))[0] if width <= DENSE_UP_TO else 0.0
        for per_unit in PER_UNIT:
            case = Layer.make(width, per_unit)
            sides = (case.step, case.stock(), case.by_torch_operators, case.by_rows())
            ours, stock, operators, rows = medians(*sides)
            found[width, per_unit] = {"ours": ours, "stock": stock, "dense": dense}
            faster = f"{dense / ours:.0f}x" if dense else ""
            print(
                f"| {width} | {per_unit} | {faster} | {stock / ours:.1f}x "
                f"| {operators / ours:.1f}x | {1e3 * ours:.2f} ms | {1e3 * rows:.2f} ms |",
                flush=True,
            )
    return found


def threads_table() -> None:
    print("\n| width | per unit | one thread / two threads |\n|---|---|---|")
    for width in WIDTHS[1:]:
        for per_unit in PER_UNIT:
            case = Layer.make(width, per_unit)

            def run(threads: int, case: Layer = case) -> object:
                torch.set_num_threads(threads)
                return case.step()

            one, two = medians(lambda: run(1), lambda: run(2))
            print(f"| {width} | {per_unit} | {one / two:.2f}x |", flush=True)


def update_table() -> None:
    torch.set_num_threads(1)
    print("\n| width | per unit | update, in steps | step | update |\n|---" + "|---" * 4 + "|")
    for width in WIDTHS[1:]:
        for per_unit in PER_UNIT[:2]:
            case = Layer.make(width, per_unit)
            optimizer = torch.optim.SGD(case.layer.parameters(), lr=0.1, momentum=0.9)
            budget = spartan.Budget(density=case.layer.density)
            method = GSE(period=1, end=1.0)
            sparsifier = spartan.Sparsifier(case.layer, optimizer, method, budget, 10_000)

            def train(case: Layer = case, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.zero_grad()
                case.layer(case.x).backward(case.dy)
                optimizer.step()

            with_update = medians(train)[0]
            sparsifier.finalize()
            alone = medians(train)[0]
            steps = (with_update - alone) / alone
            print(
                f"| {width} | {per_unit} | {steps:.1f} | {1e3 * alone:.2f} ms "
                f"| {1e3 * (with_update - alone):.1f} ms |",
                flush=True,
            )


def memory_of(width: int, per_unit: int) -> None:
    """Print the bytes that three training steps take at most; of a dense layer for 0 per unit."""
    Layer.make(64, 10).step()  # loads what is loaded once, and so does this:
    getattr(native_module(), "lend", torch.empty)(1)
    before = resident("VmRSS")
    case = Layer.make(width, per_unit or 1)
    layer: nn.Module = case.layer if per_unit else nn.Linear(width, width, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    Path("/proc/self/clear_refs").write_text("5")  # from here on, the peak is counted anew
    for _ in range(3):
        optimizer.zero_grad()
        case.x.grad = None
        layer(case.x).backward(case.dy)
        optimizer.step()
    print(resident("VmHWM") - before)


def resident(key: str) -> int:
    (line,) = (
        x
        for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if x.startswith(key)
    )
    return 1024 * int(line.split()[1])


def measured_memory(width: int, per_unit: int) -> int:
    command = [sys.executable, __file__, "--memory", str(width), str(per_unit)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def memory_table() -> dict[tuple[int, int], int]:
    print(
        "\n| width | per unit | bytes per connection, over the activations | peak |\n"
        "|---|---|---|---|"
    )
    found = {}
    for width in WIDTHS:
        for per_unit in PER_UNIT:
            found[width, per_unit] = measured = measured_memory(width, per_unit)
            over = measured - 4 * width * BATCH * 4  # x, y and their gradients
            print(
                f"| {width} | {per_unit} | {over / (width * per_unit):.1f} "
                f"| {measured / 1e6:.0f} MB |",
                flush=True,
            )
        if width <= DENSE_UP_TO:
            found[width, 0] = measured_memory(width, 0)
    return found


def training_table(path: str) -> None:
    from spartan.commands.images import augment, load_data, normalize

    data = load_data(path, None)
    torch.set_num_threads(1)

    def loop(model: nn.Module, growing: bool) -> Callable[[], object]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        if growing:
            budget = spartan.Budget(density=0.01)
            spartan.Sparsifier(model, optimizer, GSE(), budget, 1_000_000)
        place = 0

        def step() -> None:
            nonlocal place
            pick = slice(place, place + BATCH)
            place = (place + BATCH) % (len(data.train.labels) - BATCH)
            shifts = torch.Generator().manual_seed(place)
            inputs = augment(normalize(data.train.images[pick], data), data.flip, shifts)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), data.train.labels[pick])
            loss.backward()
            optimizer.step()

        return step

    def mlp() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(3072, 4096),
            nn.ReLU(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, 10),
        )

    print("\n| MLP 3072-4096-4096-10, batch 128 | dense / 99 % sparse | dense | sparse |")
    print("|---|---|---|---|")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        sides = (loop(mlp(), growing=False), loop(convert(mlp(), 0.01), growing=True))
        dense, sparse = medians(*sides, seconds=10)
        print(
            f"| {threads} thread(s) | {dense / sparse:.1f}x | {1e3 * dense:.1f} ms "
            f"| {1e3 * sparse:.1f} ms |",
            flush=True,
        )


def plot(
    found: dict[tuple[int, int], dict[str, float]], peaks: dict[tuple[int, int], int], path: Path
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    times, memory = figure.subplots(1, 2)
    for per_unit in PER_UNIT:
        label = f"{per_unit} per unit"
        times.plot(WIDTHS, [1e3 * found[w, per_unit]["ours"] for w in WIDTHS], "o-", label=label)
        memory.plot(WIDTHS, [peaks[w, per_unit] / 1e6 for w in WIDTHS], "o-", label=label)
    dense = [w for w in WIDTHS if w <= DENSE_UP_TO]
    times.plot(dense, [1e3 * found[w, 10]["dense"] for w in dense], "ko--", label="dense")
    memory.plot(dense, [peaks[w, 0] / 1e6 for w in dense], "ko--", label="dense")
    times.set_ylabel("step, batch 128, one thread, ms")
    memory.set_ylabel("peak of a training step, MB")
    for axes in (times, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("width")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--memory", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        memory_of(*args.memory)
        return
    found = steps_table(threads=1)
    steps_table(threads=2)
    threads_table()
    update_table()
    peaks = memory_table()
    if args.data:
        training_table(args.data)
    if args.plot:
        plot(found, peaks, args.plot)


if __name__ == "__main__":
    main()
