"""`save` and `load`: safetensors files with each sparse tensor in its smallest layout.

A packed file is a safetensors file. A tensor `w` that is smaller when stored sparsely is replaced
by the arrays of its layout, `w.compressed`, `w.bitmask`, … and `w.shape` (see `layouts`); every
other tensor is stored as it is. The round trip is exact to the bit, except that the minus zeros of
a tensor stored sparsely come back as zeros. The metadata entry `spartan.packed` holds JSON: for
each replaced tensor its layout and dtype, and for each further name of a tied tensor the first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spartan.deploy.container import (
    CODES,
    Entry,
    bits_of,
    write_file,
)
from spartan.deploy.layouts import VALUES, Layout, MatrixShape, Parts, smallest
from spartan.deploy.packed import BY_NAME, KEY, VERSION, PackedTensors, is_dict_of
from spartan.errors import DeployError
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
) -> list[Stored]:
    """Write a model's tensors into a safetensors file, each in its smallest layout.

    The file is written tensor by tensor, and appears when it is whole.

    Args:
        model: A module, or its state dict.
        path: The file.
        compress: Whether to use sparse layouts; without, the file is an ordinary one.
        values: `"float16"` or `"bfloat16"` to round the wider floats of tensors with two or more
            dimensions; `load` returns them in their own dtype.
        metadata: Further metadata of the file.

    Returns:
        How each tensor was stored.

    Raises:
        DeployError: A tensor cannot be stored, does not fit the narrower dtype, or would be packed
            where transformers looks for ordinary ones.
        FileError: The file cannot be written.
    """
    if values is not None and values not in _NARROW:
        raise DeployError(f"values={values!r}: choose 'float16' or 'bfloat16', or leave it out.")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    _check_metadata(metadata or {}, state)
    aliases = _aliases(state)
    names = [name for name in state if name not in aliases]
    narrow = None if values is None else _NARROW[values]

    described: dict[str, dict[str, str]] = {}
    entries: list[Entry] = []
    report: list[Stored] = []
    for name in names:
        tensor = state[name]
        stored = _narrowed(name, tensor, narrow)
        layout, parts = _smallest(name, stored, state) if compress else (None, None)
        kind = "dense" if layout is None else layout.name
        if kind != "dense" or stored.dtype != tensor.dtype:
            described[name] = {"layout": kind, "dtype": CODES[tensor.dtype]}
        own = list(_entries(name, stored, parts))
        entries += own
        dense_bytes = tensor.numel() * tensor.element_size()
        report.append(Stored(name, kind, dense_bytes, sum(entry.nbytes for entry in own)))

    def arrays() -> Iterator[Any]:
        for name in names:
            stored = _narrowed(name, state[name], narrow)
            layout = described.get(name, {}).get("layout", "dense")
            if layout == "dense":
                yield bits_of(stored)
                continue
            parts = BY_NAME[layout].encode(_matrix(stored))
            assert parts is not None
            yield from parts.values()
            yield np.array(stored.shape, np.int64)

    if described:
        _refuse_pretrained(Path(path))
    header = {"format": "pt", **(metadata or {})}
    # Without, tensors of this name would be taken for those of another packer.
    if described or aliases or any(name.endswith(".bitmask") for name in names):
        own_metadata = {"version": VERSION, "tensors": described, "aliases": aliases}
        header[KEY] = json.dumps(own_metadata)
    write_atomically(Path(path), lambda temporary: write_file(temporary, entries, header, arrays))
    return report


def load(path: str | Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Read a packed or ordinary safetensors file.

    Everything is checked before the model is changed.

    Args:
        path: The file.
        model: If given, its tensors are overwritten, one at a time.

    Returns:
        The tensors by name; with a model, its state dict.

    Raises:
        FileError: The file is missing, damaged or contradicts itself.
        DeployError: It is not a file of this model.
    """
    packed = PackedTensors(path)
    if model is None:
        own = {name: packed[name] for name in packed if name not in packed.aliases}
        return {name: own[packed.aliases.get(name, name)] for name in packed}
    state = model.state_dict()
    _check_fit(packed, state)
    packed.check()
    with torch.no_grad():
        for name in packed:
            state[name].copy_(packed[name])
    return state


def _refuse_pretrained(path: Path) -> None:
    """Raise `DeployError` if this is the file that `from_pretrained` reads of a folder.

    It would take what is packed for missing, and leave those weights at random.
    """
    config = path.parent / "config.json"
    if path.name != "model.safetensors" or not config.is_file():
        return
    try:
        told = json.loads(config.read_text())
    except ValueError:
        return
    if isinstance(told, dict) and "model_type" in told:
        raise DeployError(
            f"{str(path)!r} is what from_pretrained of transformers reads, which knows no packed "
            "tensors: choose another name, such as packed.safetensors. To load that, make the "
            "model from its config and give it to spartan.load; or write an ordinary file with "
            "compress=False."
        )


def _check_metadata(metadata: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    if not is_dict_of(dict(metadata), str) or KEY in metadata:
        raise DeployError(f"metadata= takes texts, under other names than {KEY!r}.")
    if "__metadata__" in set(state):
        raise DeployError("A safetensors file cannot hold a tensor named '__metadata__'.")


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return, for each further name of a tied tensor, its first.

    Raises:
        DeployError: A tensor cannot be stored.
    """
    if isinstance(state, PackedTensors):
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
    # What the header says of an array, and the metadata of a packed tensor.
    found = smallest(_matrix(tensor), 2 * len(name) + 128) if tensor.numel() else None
    # A tensor whose parts would take the name of another stays as it is.
    if found is None or any(f"{name}.{part}" in state for part in (*found[0].parts, "shape")):
        return None, None
    return found


def _entries(name: str, tensor: Tensor, parts: Parts | None) -> Iterator[Entry]:
    code = CODES[tensor.dtype]
    if parts is None:
        yield Entry(name, code, tuple(tensor.shape), tensor.numel() * tensor.element_size())
        return
    for part, array in parts.items():
        own = code if part == VALUES else f"{array.dtype.kind.upper()}{8 * array.itemsize}"
        yield Entry(f"{name}.{part}", own, array.shape, array.nbytes)
    yield Entry(f"{name}.shape", "I64", (tensor.dim(),), 8 * tensor.dim())


def _check_fit(packed: PackedTensors, state: Mapping[str, Tensor]) -> None:
    # Older files do not count batches; like torch, leave the model's own count.
    counters = {name for name in state if name.endswith("num_batches_tracked")}
    missing = sorted(set(state) - set(packed) - counters)
    unknown = sorted(set(packed) - set(state))
    if missing or unknown:
        raise DeployError(
            f"{str(packed.path)!r} is not a file of this model: it lacks {missing[:5]} and has "
            f"{unknown[:5]} besides."
        )
    for name in packed:
        tensor = state[name]
        writable = not tensor.is_meta and (0 not in tensor.stride() or tensor.numel() < 2)
        if not writable:
            raise DeployError(
                f"{name!r} of the model cannot be written: it is expanded or on the meta device."
            )
        if packed.dtype(name).is_floating_point and not tensor.is_floating_point():
            raise DeployError(
                f"{str(packed.path)!r} is not a file of this model: {name!r} is "
                f"{packed.dtype(name)} in the file and {tensor.dtype} in the model."
            )
        if tuple(tensor.shape) != packed.shapes[name]:
            raise DeployError(
                f"{str(packed.path)!r} is not a file of this model: {name!r} has shape "
                f"{packed.shapes[name]} in the file and {tuple(tensor.shape)} in the model."
            )
