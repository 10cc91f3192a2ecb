"""The commands of `spartan` that take a model the rest of the way: smaller, faster, elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spartan.deploy.bench import bench as run_bench
from spartan.deploy.bench import parse_shape, write_bench
from spartan.deploy.doctor import examine
from spartan.deploy.onnx import export_onnx
from spartan.deploy.packed import PackedTensors
from spartan.deploy.packing import Stored, save
from spartan.deploy.sizes import measure_sizes
from spartan.errors import ConfigError, DeployError
from spartan.training.opening import open_model
from spartan.training.run import Run


def deploy_commands() -> dict[str, Callable[..., int]]:
    """Return the commands by name."""
    return {
        "pack": pack,
        "unpack": unpack,
        "bench": bench,
        "doctor": doctor,
        "export": export,
    }


def pack(
    source: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    values: Literal["same", "float16", "bfloat16"] = "same",
    zstd: bool = True,
) -> int:
    """Write a smaller safetensors file: every tensor in its smallest layout.

    Args:
        source: Safetensors file, or run folder.
        out: File to write.
        values: Round the weights to 16 bits, or leave them the same.
        zstd: Compare with what zstd makes of the dense tensors.
    """
    file = Run.open(source).model_path if source.is_dir() else source
    _refuse_same(file, out)
    tensors = PackedTensors(file)
    narrow = None if values == "same" else values
    stored = save(tensors, out, values=narrow, metadata=tensors.metadata)
    sizes = measure_sizes(stored, out.stat().st_size, tensors if zstd else None)
    console = Console()
    console.print(_stored_table(out, stored))
    console.print(str(sizes), highlight=False, soft_wrap=True, markup=False)
    return 0


def unpack(source: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path]) -> int:
    """Write an ordinary safetensors file from a packed one.

    Args:
        source: Packed file.
        out: File to write.
    """
    _refuse_same(source, out)
    tensors = PackedTensors(source)
    tensors.check()
    save(tensors, out, compress=False, metadata=tensors.metadata)
    before, after = source.stat().st_size, out.stat().st_size
    Console().print(f"{out}: {after:,} bytes; packed {before:,}", highlight=False, soft_wrap=True)
    return 0


def bench(
    model: tyro.conf.Positional[str],
    input: str | None = None,
    batch: tuple[int, ...] = (),
    weights: Path | None = None,
    threads: int | None = None,
    classes: int = 10,
    seconds: float = 0.2,
    out: Path = Path("bench"),
) -> int:
    """Time a model dense and accelerated, per layer and whole.

    Args:
        model: Run folder, or a model as in `spartan train --model`.
        input: Shape of an input, like 1x3x32x32; a run knows its own.
        batch: Batch sizes; by default that of the input.
        weights: Safetensors file, packed or not; a run's own weights by default.
        threads: Threads to use.
        classes: Classes of a model by name.
        seconds: How long to measure each layer.
        out: Folder for the table, the figures as JSON, and the plot.
    """
    shape = None if input is None else parse_shape(input)
    opened, shape = open_model(model, weights, shape, classes)
    if min(batch, default=1) < 1 or seconds <= 0:
        raise ConfigError("--batch and --seconds must be positive.")
    plans = run_bench(opened, shape, batch or shape[:1], threads, seconds)
    console = Console()
    for size, plan in plans.items():
        console.print(f"batch {size}\n{plan}", highlight=False, soft_wrap=True, markup=False)
    for file in write_bench(plans, out):
        console.print(f"wrote {file}", highlight=False, soft_wrap=True)
    return 0


def doctor() -> int:
    """Print what this machine can use, and what is missing."""
    table = Table("", "found", "advice", show_header=True)
    for finding in examine():
        table.add_row(*map(escape, (finding.subject, finding.found, finding.advice)))
    Console().print(table)
    return 0


def export(
    model: tyro.conf.Positional[str],
    onnx: Path,
    input: str | None = None,
    weights: Path | None = None,
    classes: int = 10,
    purge: bool = True,
) -> int:
    """Write an ONNX file, and check it against ONNX Runtime.

    Args:
        model: Run folder, or a model as in `spartan train --model`.
        onnx: File to write.
        input: Shape of an input, like 1x3x32x32; a run knows its own.
        weights: Safetensors file, packed or not; a run's own weights by default.
        classes: Classes of a model by name.
        purge: Remove channels that are zero first.
    """
    shape = None if input is None else parse_shape(input)
    opened, shape = open_model(model, weights, shape, classes)
    exported = export_onnx(opened, torch.randn(shape), onnx, purge=purge)
    Console().print(str(exported), highlight=False, soft_wrap=True)
    return 0


def _stored_table(out: Path, stored: list[Stored]) -> Table:
    table = Table("tensor", "layout", "dense bytes", "bytes", "ratio", title=str(out))
    for column in table.columns[2:]:
        column.justify = "right"
    for s in stored:
        ratio = f"{s.bytes / s.dense_bytes:.4f}" if s.dense_bytes else "-"
        table.add_row(escape(s.name), s.layout, f"{s.dense_bytes:,}", f"{s.bytes:,}", ratio)
    return table


def _refuse_same(source: Path, out: Path) -> None:
    if out.is_dir():
        raise DeployError(f"{str(out)!r} is a folder; name a file to write.")
    if source.exists() and out.exists() and source.samefile(out):
        raise DeployError(f"{str(out)!r} is the file to read; write to another one.")
