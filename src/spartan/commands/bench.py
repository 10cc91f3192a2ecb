"""`spartan bench`: dense against accelerated, layer by layer and whole, on this machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import tyro
from matplotlib.figure import Figure
from torch import nn

from spartan.commands.inputs import Inputs
from spartan.commands.opening import open_model
from spartan.commands.terminal.console import Terminal
from spartan.deploy.accelerating import accelerate, plan_of
from spartan.deploy.plan import LayerPlan, Plan
from spartan.errors import ConfigError, DeployError, FileError
from spartan.files import write_atomically, write_text

_DENSE, _SPARSE = "#9aa5b1", "#1b6ca8"


@dataclass(frozen=True)
class Bench:
    """Time a model dense and accelerated, per layer and whole."""

    model: tyro.conf.Positional[str]
    """Run folder, or a model as in `spartan train --model`."""
    input: tuple[str, ...] = ()
    """What goes in, batch first: 1x3x32x32, or input_ids=1x128:int64 mask=1x128:bool, or a function
    that returns it (package.module:function). A run knows its own."""
    batch: tuple[int, ...] = ()
    """Batch sizes; by default that of the input."""
    weights: Path | None = None
    """Safetensors file, packed or not; a run's own weights by default."""
    threads: int | None = None
    """Threads to use."""
    classes: int = 10
    """Classes of a model by name."""
    seconds: float = 0.2
    """How long to measure each layer."""
    out: Path = Path("bench")
    """Folder for the table, the figures as JSON, and the plot."""
    trust: bool = False
    """Call the function that a run folder names as its model, if it is not a model of spartan, timm
    or transformers: whoever wrote the folder chooses what runs."""

    def run(self) -> int:
        """Run the command."""
        inputs = Inputs(self.input)
        opened, shape = open_model(self.model, self.weights, inputs.shape, self.classes, self.trust)
        if min(self.batch, default=1) < 1 or self.seconds <= 0:
            raise ConfigError("--batch and --seconds must be positive.")
        sizes = self.batch or (inputs.shape or shape)[:1]
        examples = {size: inputs.make(opened, shape, size) for size in sizes}
        plans = bench(opened, examples, self.threads, self.seconds)
        console = Terminal()
        for size, plan in plans.items():
            console.print(f"batch {size}\n{plan}", highlight=False, soft_wrap=True, markup=False)
        for file in write_bench(plans, self.out):
            console.print(f"wrote {file}", highlight=False, soft_wrap=True)
        return 0


def bench(
    model: nn.Module,
    examples: Mapping[int, Any],
    threads: int | None = None,
    seconds: float = 0.2,
) -> dict[int, Plan]:
    """Accelerate and time a model for several batch sizes.

    Args:
        model: The model.
        examples: An input for each batch size.
        threads: Threads to use; as many as torch does if not given.
        seconds: How long to measure each layer; the whole model takes five times as long.

    Returns:
        A plan per batch size.
    """
    with _using_threads(threads):
        return {
            batch: plan_of(accelerate(model, example, seconds=seconds, verbose=False))
            for batch, example in examples.items()
        }


def write_bench(plans: dict[int, Plan], folder: Path) -> list[Path]:
    """Write the figures as text, JSON and a picture; returns the files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"Cannot make the folder {str(folder)!r}: {error.strerror}.") from error
    table, data, picture = folder / "bench.txt", folder / "bench.json", folder / "bench.svg"
    write_text(table, "\n\n".join(f"batch {b}\n{plan}" for b, plan in plans.items()) + "\n")
    facts = {str(b): dataclasses.asdict(plan) for b, plan in plans.items()}
    write_text(data, json.dumps(facts, indent=1))
    figure = _draw(plans)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bench"}):
        write_atomically(
            picture, lambda path: figure.savefig(path, format="svg", metadata={"Date": None})
        )
    return [table, data, picture]


def _draw(plans: dict[int, Plan]) -> Figure:
    rows = max(1, *(len(_timed(plan)) for plan in plans.values()))
    figure = Figure((5.5 * len(plans), 1.2 + 0.28 * rows), layout="constrained")
    for axes, (batch, plan) in zip(
        figure.subplots(1, len(plans), squeeze=False)[0], plans.items(), strict=True
    ):
        layers = _timed(plan)
        names = [layer.name for layer in layers]
        places = range(len(layers))
        sides = ((-0.2, _DENSE, "dense"), (0.2, _SPARSE, "sparse"))
        for shift, color, label in sides:
            timings = [getattr(layer, label) for layer in layers]
            medians = [1e3 * timing.median for timing in timings]
            low = [1e3 * (timing.median - timing.low) for timing in timings]
            high = [1e3 * (timing.high - timing.median) for timing in timings]
            axes.barh(
                [place + shift for place in places], medians, 0.4, color=color, label=label,
                xerr=(low, high), error_kw={"linewidth": 0.8, "ecolor": "#333333"},
            )  # fmt: skip
        for place, layer in enumerate(layers):
            assert layer.dense is not None
            assert layer.sparse is not None
            ratio = layer.dense.median / layer.sparse.median
            end = 1e3 * max(layer.dense.high, layer.sparse.high)
            axes.annotate(f" {ratio:.1f}x", (end, place), va="center", fontsize=7)
        axes.set_yticks(list(places), names, fontsize=7, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds: median and quartiles")
        threads = f"{plan.threads} thread{'s' * (plan.threads != 1)}"
        axes.set_title(
            f"batch {batch}, {threads}; whole model {1e3 * plan.dense.median:.2f} → "
            f"{1e3 * plan.accelerated.median:.2f} ms, {plan.speedup:.1f}x",
            fontsize=9,
        )
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        if layers:
            axes.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def _timed(plan: Plan) -> list[LayerPlan]:
    return [layer for layer in plan.layers if layer.dense and layer.sparse]


@contextmanager
def _using_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None and threads < 1:
        raise DeployError(f"--threads {threads}: at least one thread is needed.")
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
