"""Models in files that are smaller because weights are zero.

A packed file is a safetensors file. A tensor `w` that is smaller when stored sparsely is replaced
by the arrays of its layout, `w.compressed`, `w.bitmask`, … and `w.shape` (see `layouts`); every
other tensor is stored as it is. The round trip is exact to the bit, except that the minus zeros of
a tensor stored sparsely come back as zeros. The metadata entry `spartan.packed` holds JSON: for
each replaced tensor its layout and dtype, and for each further name of a tied tensor the first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spartan.deploy.container import (
    CODES,
    Entry,
    bits_of,
    refuse_more_than_memory,
    tensor_of,
    write_file,
)
from spartan.deploy.layouts import LAYOUTS, VALUES, Layout, Parts, Shape, smallest
from spartan.errors import DeployError, FileError
from spartan.files import write_atomically

_KEY = "spartan.packed"
_VERSION = 1
_BY_NAME = {layout.name: layout for layout in LAYOUTS}
_DTYPES = {code: dtype for dtype, code in CODES.items()}
_NARROW = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_MOST_DIMENSIONS = 16


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
        DeployError: A tensor cannot be stored, or does not fit the narrower dtype.
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
        own = list(_entries(name, stored, parts))
        entries += own
        if layout is not None or stored.dtype != tensor.dtype:
            kind = "dense" if layout is None else layout.name
            described[name] = {"layout": kind, "dtype": CODES[tensor.dtype]}
        report.append(
            Stored(
                name,
                "dense" if layout is None else layout.name,
                tensor.numel() * tensor.element_size(),
                sum(entry.nbytes for entry in own),
            )
        )

    def arrays() -> Iterator[Any]:
        for name in names:
            stored = _narrowed(name, state[name], narrow)
            layout = described.get(name, {}).get("layout", "dense")
            if layout == "dense":
                yield bits_of(stored)
                continue
            parts = _BY_NAME[layout].encode(_matrix(stored))
            assert parts is not None
            yield from parts.values()
            yield np.array(stored.shape, np.int64)

    header = {"format": "pt", **(metadata or {})}
    # Without, tensors of this name would be taken for those of another packer.
    if described or aliases or any(name.endswith(".bitmask") for name in names):
        own_metadata = {"version": _VERSION, "tensors": described, "aliases": aliases}
        header[_KEY] = json.dumps(own_metadata)
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


class PackedTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, read and unpacked one by one.

    Args:
        path: A packed or an ordinary file.

    Raises:
        FileError: The file is missing, damaged or contradicts itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileError(f"There is no file {str(path)!r}.")
        try:
            # Kept open: what is checked is what is read, should the file be replaced meanwhile.
            self._file: Any = safe_open(self.path, "pt").__enter__()  # type: ignore[no-untyped-call]
            self._keys = set(self._file.keys())
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
            own = json.loads(self.metadata.pop(_KEY, "null"))
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise self._damaged(str(error)) from error
        self._described, self.aliases = self._read_description(own)
        self.shapes = self._read_shapes()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        name = self.aliases.get(name, name)
        described = self._described.get(name)
        if described is None:
            return self._read(name)
        dtype = _DTYPES[described["dtype"]]
        if described["layout"] == "dense":
            return self._read(name).to(dtype)
        stored, parts = self._parts(name)
        shape = Shape(self.shapes[name])
        try:
            bits = _BY_NAME[described["layout"]].decode(parts, shape)
        except FileError as error:
            raise self._damaged(f"{name!r}: {error}") from error
        return tensor_of(bits, stored, shape.dims).to(dtype)

    def check(self) -> None:
        """Refuse a file whose indices contradict its shapes.

        Raises:
            FileError: The file is damaged.
        """
        for name, described in self._described.items():
            if described["layout"] != "dense":
                _, parts = self._parts(name)
                try:
                    _BY_NAME[described["layout"]].positions(parts, Shape(self.shapes[name]))
                except FileError as error:
                    raise self._damaged(f"{name!r}: {error}") from error

    def _read_description(self, own: Any) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Return layout and dtype of the packed tensors, and the other names of tied ones."""
        if own is None:
            return self._bitmasks_of_others(), {}
        if not isinstance(own, dict) or own.get("version") != _VERSION:
            raise self._damaged(f"its layouts are not of version {_VERSION}")
        tensors: Any = own.get("tensors")
        aliases: Any = own.get("aliases")
        texts = _is_dict_of(aliases, str) and _is_dict_of(tensors, dict)
        if not texts or not all(_is_dict_of(told, str) for told in tensors.values()):
            raise self._damaged("its metadata are not what this program writes")
        for name, told in tensors.items():
            layout, code = told.get("layout"), told.get("dtype")
            if code not in _DTYPES or (layout != "dense" and layout not in _BY_NAME):
                raise self._damaged(f"{name!r} has the unknown layout {layout!r} or dtype {code!r}")
        return tensors, aliases

    def _bitmasks_of_others(self) -> dict[str, dict[str, str]]:
        """Describe what compressed-tensors wrote as `sparse-bitmask`."""
        described = {}
        for key in sorted(self._keys):
            name = key.removesuffix(".bitmask")
            mine = {f"{name}.{part}" for part in (VALUES, "bitmask", "shape")}
            if key != name and mine <= self._keys:
                code = str(self._file.get_slice(f"{name}.{VALUES}").get_dtype())
                if code not in _DTYPES:
                    raise self._damaged(f"{name!r} has the unknown dtype {code!r}")
                described[name] = {"layout": "bitmask", "dtype": code}
                self._keys.discard(f"{name}.row_offsets")
        return described

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        left, total = set(self._keys), 0
        shapes: dict[str, tuple[int, ...]] = {}
        for name, described in self._described.items():
            if described["layout"] == "dense":
                continue
            needed = {f"{name}.{part}" for part in (*_BY_NAME[described["layout"]].parts, "shape")}
            if not needed <= left or name in left:
                missing = ", ".join(sorted(needed - left)) or "a name of its own"
                raise self._damaged(f"{name!r} lacks {missing}")
            left -= needed
            shapes[name] = self._read_shape(name)
            total += math.prod(shapes[name]) * _DTYPES[described["dtype"]].itemsize
        try:
            refuse_more_than_memory(total)
        except FileError as error:
            raise FileError(f"{str(self.path)!r} cannot be unpacked: {error}.") from error
        for key in sorted(left):
            view = self._file.get_slice(key)
            if str(view.get_dtype()) not in _DTYPES:
                raise self._damaged(f"{key!r} has the unknown dtype {view.get_dtype()!r}")
            shapes[key] = tuple(view.get_shape())
        if not all(name in shapes for name in (*self.aliases.values(), *self._described)):
            raise self._damaged("its metadata name a tensor that is not there")
        if any(name in shapes for name in self.aliases):
            raise self._damaged("two of its tensors have one name")
        return {**shapes, **{name: shapes[first] for name, first in self.aliases.items()}}

    def _read_shape(self, name: str) -> tuple[int, ...]:
        dims = self._read(f"{name}.shape")
        whole = dims.dim() == 1 and dims.dtype in (torch.int64, torch.int32)
        sane = whole and len(dims) <= _MOST_DIMENSIONS and bool((dims >= 0).all())
        # Zero-sized tensors too have strides that must be countable.
        if not sane or math.prod(max(1, d) for d in dims.tolist()) >= 1 << 62:
            raise self._damaged(f"{name!r} has no sensible shape")
        return tuple(dims.tolist())

    def _parts(self, name: str) -> tuple[torch.dtype, Parts]:
        """Return the dtype of the stored values, and the arrays of a layout."""
        layout = _BY_NAME[self._described[name]["layout"]]
        values = self._read(f"{name}.{VALUES}")
        if values.dtype not in CODES:
            raise self._damaged(f"{name!r} has values of the unknown dtype {values.dtype}")
        parts: Parts = {VALUES: bits_of(values)}
        for part in layout.parts[1:]:
            array = self._read(f"{name}.{part}")
            if array.dtype not in CODES or array.is_floating_point():
                raise self._damaged(f"{name}.{part} is not made of integers")
            parts[part] = array.numpy()
        return values.dtype, parts

    def _read(self, key: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise self._damaged(str(error)) from error
        return tensor

    def _damaged(self, reason: str) -> FileError:
        return FileError(f"{str(self.path)!r} is damaged or not a safetensors file: {reason}.")


def _is_dict_of(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(item, kind) for item in value.values())


def _check_metadata(metadata: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    if not _is_dict_of(dict(metadata), str) or _KEY in metadata:
        raise DeployError(f"metadata= takes texts, under other names than {_KEY!r}.")
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
    shape = Shape(tuple(tensor.shape))
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
    missing, unknown = sorted(set(state) - set(packed)), sorted(set(packed) - set(state))
    if missing or unknown:
        raise DeployError(
            f"{str(packed.path)!r} is not a file of this model: it lacks {missing[:5]} and has "
            f"{unknown[:5]} besides."
        )
    for name, tensor in state.items():
        writable = not tensor.is_meta and (0 not in tensor.stride() or tensor.numel() < 2)
        if not writable:
            raise DeployError(
                f"{name!r} of the model cannot be written: it is expanded or on the meta device."
            )
        if tuple(tensor.shape) != packed.shapes[name]:
            raise DeployError(
                f"{str(packed.path)!r} is not a file of this model: {name!r} has shape "
                f"{packed.shapes[name]} in the file and {tuple(tensor.shape)} in the model."
            )
