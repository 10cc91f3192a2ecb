"""`spartan pack` and `spartan unpack`: smaller safetensors files, and ordinary ones again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.table import Table

from spartan.commands.runs.folder import Run
from spartan.commands.terminal.console import Terminal
from spartan.deploy.packing import Stored, save
from spartan.deploy.shards import open_tensors
from spartan.deploy.sizes import measure_sizes
from spartan.errors import DeployError


@dataclass(frozen=True)
class Pack:
    """Write a smaller safetensors file: every tensor in its smallest layout."""

    source: tyro.conf.Positional[Path]
    """Safetensors file, or run folder."""
    out: tyro.conf.Positional[Path]
    """File to write."""
    values: Literal["same", "float16", "bfloat16"] = "same"
    """Round the weights to 16 bits, or leave them the same."""
    zstd: bool = True
    """Compare with what zstd makes of the dense tensors."""

    def run(self) -> int:
        """Run the command."""
        file = Run.open(self.source).model_path if self.source.is_dir() else self.source
        _refuse_same(file, self.out)
        tensors = open_tensors(file)
        narrow = None if self.values == "same" else self.values
        stored = save(tensors, self.out, values=narrow, metadata=tensors.metadata)
        sizes = measure_sizes(stored, self.out.stat().st_size, tensors if self.zstd else None)
        console = Terminal()
        console.print(_stored_table(self.out, stored))
        console.print(str(sizes), highlight=False, soft_wrap=True, markup=False)
        return 0


@dataclass(frozen=True)
class Unpack:
    """Write an ordinary safetensors file from a packed one."""

    source: tyro.conf.Positional[Path]
    """Packed file."""
    out: tyro.conf.Positional[Path]
    """File to write."""

    def run(self) -> int:
        """Run the command."""
        _refuse_same(self.source, self.out)
        tensors = open_tensors(self.source)
        tensors.check()
        save(tensors, self.out, compress=False, metadata=tensors.metadata)
        before, after = self.source.stat().st_size, self.out.stat().st_size
        line = f"{self.out}: {after:,} bytes; packed {before:,}"
        Terminal().print(line, highlight=False, soft_wrap=True)
        return 0


def _stored_table(out: Path, stored: list[Stored]) -> Table:
    table = Table("tensor", "layout", "dense bytes", "bytes", "ratio", title=str(out))
    for column in table.columns[2:]:
        column.justify = "right"
    for s in stored:
        ratio = f"{s.bytes / s.dense_bytes:.4f}" if s.dense_bytes else "-"
        table.add_row(s.name, s.layout, f"{s.dense_bytes:,}", f"{s.bytes:,}", ratio)
    return table


def _refuse_same(source: Path, out: Path) -> None:
    if out.is_dir():
        raise DeployError(f"{str(out)!r} is a folder; name a file to write.")
    if source.exists() and out.exists() and source.samefile(out):
        raise DeployError(f"{str(out)!r} is the file to read; write to another one.")
