"""`save`: safetensors files with each sparse tensor in its smallest layout.

A packed file is a safetensors file. A tensor `w` that is smaller when stored sparsely is replaced
by the arrays of its layout, `w.compressed`, `w.bitmask`, … and `w.shape` (see `layouts`); every
other tensor is stored as it is. The round trip is exact to the bit, except that the minus zeros of
a tensor stored sparsely come back as zeros. The metadata entry `spartan.packed` holds JSON: for
each replaced tensor its layout and dtype, and for each further name of a tied tensor the first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spartan.checksums import KEY as CHECKSUMS
from spartan.container import (
    CODES,
    WITH_PLAIN_ZEROS,
    Entry,
    bits_of,
    entry_of,
    write_file,
)
from spartan.deploy.layouts import VALUES, Layout, MatrixShape, Parts, smallest
from spartan.deploy.packed import BY_NAME, KEY, VERSION, PackedTensors, is_dict_of
from spartan.deploy.shards import INDEX, ShardedTensors, divide, refuse_pretrained, write_index
from spartan.errors import DeployError, FileError
from spartan.files import write_atomically

_NARROW = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """How one tensor was stored.

    Attributes:
        name: Of the tensor.
        layout: `dense` or one of `layouts`.
        dense_bytes: Its size as a dense tensor.
        bytes: What it takes in the file.
    """

    name: str
    layout: str
    dense_bytes: int
    bytes: int


def save(
    model: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    *,
    compress: bool = True,
    values: str | None = None,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = 5 << 30,
) -> list[Stored]:
    """Write a model's tensors into a safetensors file, each in its smallest layout.

    The file is written tensor by tensor, and appears when it is whole. A tensor that has several
    names is stored once.

    Args:
        model: A module, or its state dict.
        path: The file. If its name ends with `.safetensors.index.json`, the tensors go into several
            files beside it, in a folder that is made, and it says which are where.
        compress: Whether to use sparse layouts; without, the file is an ordinary one.
        values: `"float16"` or `"bfloat16"` to round the wider floats of tensors with two or more
            dimensions; `load` returns them in their own dtype.
        metadata: Further metadata of the file.
        shard_bytes: Of each of several files, if no tensor is larger.

    Returns:
        How each tensor was stored.

    Raises:
        DeployError: A tensor cannot be stored, does not fit the narrower dtype, or would be packed
            where transformers looks for ordinary ones.
        FileError: The file cannot be written.
    """
    if values is not None and values not in _NARROW:
        raise DeployError(f"values={values!r}: choose 'float16' or 'bfloat16', or leave it out.")
    path = Path(path)
    state = model.state_dict() if isinstance(model, nn.Module) else model
    _check_metadata(metadata or {}, state)
    tensors = _Tensors(state, compress, None if values is None else _NARROW[values])
    if tensors.described:
        refuse_pretrained(path)
    if not path.name.endswith(INDEX):
        tensors.write(path, tensors.names, metadata or {})
        return list(tensors.stored.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"Cannot make the folder {str(path.parent)!r}: {error.strerror}."
        ) from error
    sizes = {name: tensors.stored[name].bytes for name in tensors.names}
    shards = divide(sizes, shard_bytes, path)
    for shard, names in shards.items():
        tensors.write(shard, names, metadata or {})
    places = {entry.name: shard.name for shard, names in shards.items()
              for name in names for entry in tensors.entries[name]}  # fmt: skip
    write_index(path, places, sum(sizes.values()))
    return list(tensors.stored.values())


class _Tensors:
    """How each tensor of a state is stored.

    Attributes:
        names: Of all tensors, but for further names of tied ones.
        described: Layout and dtype of those that are not stored as they are.
        entries: The arrays that each becomes.
        stored: What to report of each.
    """

    def __init__(
        self, state: Mapping[str, Tensor], compress: bool, narrow: torch.dtype | None
    ) -> None:
        self._state, self._narrow = state, narrow
        self._aliases = _aliases(state)
        self.names = [name for name in state if name not in self._aliases]
        self.described: dict[str, dict[str, str]] = {}
        self.entries: dict[str, list[Entry]] = {}
        self.stored: dict[str, Stored] = {}
        for name in self.names:
            tensor = state[name]
            stored = _narrowed(name, tensor, narrow)
            layout, parts = _smallest(name, stored, state) if compress else (None, None)
            kind = "dense" if layout is None else layout.name
            if kind != "dense" or stored.dtype != tensor.dtype:
                self.described[name] = {"layout": kind, "dtype": CODES[tensor.dtype]}
            self.entries[name] = list(_entries(name, stored, parts))
            taken = sum(entry.nbytes for entry in self.entries[name])
            dense = tensor.numel() * tensor.element_size()
            self.stored[name] = Stored(name, kind, dense, taken)

    def write(self, path: Path, names: Sequence[str], metadata: Mapping[str, str]) -> None:
        """Write a file of these tensors."""
        described = {name: self.described[name] for name in names if name in self.described}
        aliases = {other: first for other, first in self._aliases.items() if first in set(names)}
        header = {"format": "pt", **metadata}
        # Without, tensors of this name would be taken for those of another packer.
        if described or aliases or any(name.endswith(".bitmask") for name in names):
            own_metadata = {"version": VERSION, "tensors": described, "aliases": aliases}
            header[KEY] = json.dumps(own_metadata)
        entries = [entry for name in names for entry in self.entries[name]]
        write_atomically(
            path,
            lambda temporary: write_file(temporary, entries, header, lambda: self._arrays(names)),
        )

    def _arrays(self, names: Sequence[str]) -> Iterator[Any]:
        for name in names:
            stored = _narrowed(name, self._state[name], self._narrow)
            layout = self.described.get(name, {}).get("layout", "dense")
            if layout == "dense":
                yield bits_of(stored)
                continue
            parts = BY_NAME[layout].encode(_matrix(stored))
            assert parts is not None
            yield from parts.values()
            yield np.array(stored.shape, np.int64)


def _check_metadata(metadata: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    own = {KEY, CHECKSUMS} & set(metadata)
    if not is_dict_of(dict(metadata), str) or own:
        raise DeployError(
            f"metadata= takes texts, under other names than {KEY!r} and {CHECKSUMS!r}."
        )
    if "__metadata__" in set(state):
        raise DeployError("A safetensors file cannot hold a tensor named '__metadata__'.")


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return, for each further name of a tied tensor, its first.

    Raises:
        DeployError: A tensor cannot be stored.
    """
    if isinstance(state, PackedTensors | ShardedTensors):
        return state.aliases
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in state.items():
        _check_tensor(name, tensor)
        # Other mappings may make their tensors anew, where another was.
        if isinstance(state, dict) and tensor.numel():
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if first.setdefault(place, name) != name:
                aliases[name] = first[place]
    return aliases


def _check_tensor(name: str, tensor: Any) -> None:
    plain = isinstance(tensor, Tensor) and not is_lazy(tensor)
    if not plain or tensor.layout is not torch.strided or tensor.dtype not in CODES:
        kind = f"{tensor.layout}, {tensor.dtype}" if plain else type(tensor).__name__
        raise DeployError(
            f"{name!r} is {kind}: a safetensors file holds dense tensors of ordinary dtypes only."
        )
    if tensor.is_meta:
        raise DeployError(f"{name!r} is on the meta device and holds no values.")


def _narrowed(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    wide = tensor.is_floating_point() and tensor.element_size() > 2
    if dtype is None or tensor.dim() < 2 or not wide:
        return tensor
    narrow = tensor.to(dtype)
    if not torch.equal(torch.isfinite(narrow), torch.isfinite(tensor)):
        raise DeployError(
            f"{name!r} holds values that {dtype} cannot; leave values= out, or use bfloat16."
        )
    return narrow


def _matrix(tensor: Tensor) -> Any:
    """Return the bits as a matrix; minus zeros, as `weight * mask` leaves them, become zeros."""
    shape = MatrixShape(tuple(tensor.shape))
    bits = bits_of(tensor).reshape(shape.rows, shape.columns)
    if not tensor.is_floating_point():
        return bits
    return np.where(bits == 1 << (8 * bits.itemsize - 1), bits.dtype.type(0), bits)


def _smallest(
    name: str, tensor: Tensor, state: Mapping[str, Tensor]
) -> tuple[Layout | None, Parts | None]:
    if tensor.dtype not in WITH_PLAIN_ZEROS:
        return None, None
    # What the header says of an array, and the metadata of a packed tensor.
    found = smallest(_matrix(tensor), 2 * len(name) + 128) if tensor.numel() else None
    # A tensor whose parts would take the name of another stays as it is.
    if found is None or any(f"{name}.{part}" in state for part in (*found[0].parts, "shape")):
        return None, None
    return found


def _entries(name: str, tensor: Tensor, parts: Parts | None) -> Iterator[Entry]:
    code = CODES[tensor.dtype]
    if parts is None:
        yield entry_of(name, tensor)
        return
    for part, array in parts.items():
        own = code if part == VALUES else f"{array.dtype.kind.upper()}{8 * array.itemsize}"
        yield Entry(f"{name}.{part}", own, array.shape, array.nbytes)
    yield Entry(f"{name}.shape", "I64", (tensor.dim(),), 8 * tensor.dim())
