"""`spartan inspect`: density and size of the tensors in any safetensors file or checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from torch import Tensor

from spartan.commands.terminal.console import Terminal
from spartan.commands.terminal.tables import make_table, shape_of
from spartan.container import count_nonzero
from spartan.deploy.packed import PackedTensors
from spartan.deploy.shards import open_tensors
from spartan.errors import FileError


@dataclass(frozen=True)
class Inspect:
    """Print density and size of every tensor of a safetensors file or torch checkpoint."""

    file: tyro.conf.Positional[Path]
    """The file."""
    verify: bool = False
    """Say whether every array is as it was written; files without checksums are refused."""

    def run(self) -> int:
        """Run the command."""
        console = Terminal()
        print_inspection(console, inspect_file(self.file))
        if self.verify:
            console.print(f"all {verify_file(self.file):,} arrays are as they were written")
        return 0


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a file.

    Attributes:
        name: Its path in the file.
        shape: Its shape.
        dtype: Its dtype, without `torch.`.
        numel: Number of entries.
        nonzero: Entries that are not zero.
        bytes: Size of its data.
        tied: Name of the tensor that this one is another name of, or nothing. Such are listed,
            and not counted.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    nonzero: int
    bytes: int
    tied: str = ""


@dataclass(frozen=True)
class FileFacts:
    """A file and its tensors."""

    path: Path
    bytes: int
    tensors: list[TensorFacts]


def inspect_file(path: Path) -> FileFacts:
    """Read the tensors of a file.

    Args:
        path: A `.safetensors` file, or anything `torch.load` reads without running code.

    Raises:
        FileError: The file is missing, damaged, or holds objects that only pickle can make.
    """
    if not path.is_file():
        raise FileError(f"There is no file {str(path)!r}.")
    if path.suffix == ".safetensors":
        named: Any = open_tensors(path)
    else:
        try:
            named = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FileError(
                f"{str(path)!r} is neither a safetensors file nor a torch checkpoint of plain "
                f"tensors: {reason}"
            ) from error
    # Files say which names are one tensor; what torch loaded is on one memory.
    aliases: Any = getattr(named, "aliases", None)
    first: dict[Any, str] = {}
    tensors = [
        TensorFacts(
            name=name,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            numel=tensor.numel(),
            nonzero=count_nonzero(tensor),
            bytes=tensor.numel() * tensor.element_size(),
            tied=_earlier_name(name, tensor, first) if aliases is None else aliases.get(name, ""),
        )
        for name, tensor in _walk(named, "")
    ]
    if not tensors:
        raise FileError(f"{str(path)!r} holds no tensors.")
    return FileFacts(path, path.stat().st_size, tensors)


def verify_file(path: Path) -> int:
    """Compare every array of a safetensors file with its checksum.

    Returns:
        How many there are.

    Raises:
        FileError: One differs, or the file has no checksums.
    """
    tensors = PackedTensors(path)
    if not tensors.has_checksums:
        raise FileError(
            f"{str(path)!r} has no checksums, so that nothing can be verified: another program "
            "wrote it, or an older spartan. Load it and save it again."
        )
    tensors.check()
    return len(tensors.arrays)


def _earlier_name(name: str, tensor: Tensor, first: dict[Any, str]) -> str:
    """Return the first name of the memory that a tensor is on, if it had one before."""
    if not tensor.numel():
        return ""
    place = tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
    earlier = first.setdefault(place, name)
    return "" if earlier == name else earlier


def _walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor) and value.layout == torch.strided:
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _walk(item, f"{name}.{i}" if name else str(i))


def print_inspection(console: Console, facts: FileFacts) -> None:
    """Print density and size of every tensor of a file."""
    table = make_table(
        str(facts.path), "tensor", "shape", "dtype", "nonzero", "of", "density", "bytes"
    )
    for t in facts.tensors:
        density = f"{t.nonzero / t.numel:.2%}" if t.numel else "-"
        if t.tied:
            table.add_row(t.name, shape_of(t.shape), t.dtype, "", "", f"is {t.tied}", "")
            continue
        table.add_row(
            t.name, shape_of(t.shape), t.dtype, f"{t.nonzero:,}", f"{t.numel:,}", density,
            f"{t.bytes:,}",
        )  # fmt: skip
    counted = [t for t in facts.tensors if not t.tied]
    nonzero, numel = (sum(getattr(t, k) for t in counted) for k in ("nonzero", "numel"))
    table.add_section()
    table.add_row(
        "all", "", "", f"{nonzero:,}", f"{numel:,}", f"{nonzero / numel:.2%}" if numel else "-",
        f"{sum(t.bytes for t in counted):,}",
    )  # fmt: skip
    console.print(table)
    console.print(f"file size {facts.bytes:,} bytes", highlight=False)
