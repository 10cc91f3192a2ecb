"""`PackedTensors`: reads packed safetensors files, and validates every index first."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spartan.checksums import KEY as CHECKSUMS
from spartan.checksums import Checksums
from spartan.container import (
    CODES,
    bits_of,
    refuse_more_than_memory,
    tensor_of,
    tensor_shape,
)
from spartan.deploy.layouts import LAYOUTS, VALUES, Layout, MatrixShape, Parts
from spartan.errors import FileError

KEY = "spartan.packed"  # of the metadata
VERSION = 1
BY_NAME = {layout.name: layout for layout in LAYOUTS}
_DTYPES = {code: dtype for dtype, code in CODES.items()}
# Of a tensor in a file. No model has so many; headers that claim more are damaged.
_MOST_DIMENSIONS = 16
# What a file may unpack to by default: so many bytes, or so many times its size. A weight of 99.9 %
# zeros is 800 times as large as its file.
_SMALL, _FACTOR = 64 << 20, 1000
_LARGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses larger ones


class PackedTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, read and unpacked one by one.

    Attributes:
        arrays: Names of all arrays in the file.

    Args:
        path: A packed or an ordinary file.
        max_bytes: What all packed tensors may take together; by default 1,000 times the file, or
            64 MiB for small ones.

    Raises:
        FileError: The file is missing, damaged or contradicts itself.
    """

    def __init__(self, path: str | Path, max_bytes: int | None = None) -> None:
        self.path = Path(path)
        self._max_bytes = max_bytes
        if not self.path.is_file():
            raise FileError(f"There is no file {str(path)!r}.")
        try:
            # Kept open: what is checked is what is read, should the file be replaced meanwhile.
            self._file: Any = safe_open(self.path, "pt").__enter__()  # type: ignore[no-untyped-call]
            self._keys = set(self._file.keys())
            self.arrays = frozenset(self._keys)
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
            self._sums = Checksums(self.metadata, self._keys)
            self.metadata.pop(CHECKSUMS, None)
            own = json.loads(self.metadata.pop(KEY, "null"))
        except FileError as error:
            raise self._damaged(str(error)) from error
        except OSError as error:
            raise FileError(f"{str(path)!r} cannot be read: {error}.") from error
        except (SafetensorError, ValueError, RecursionError) as error:
            raise self._of_another_kind() or self._damaged(str(error)) from error
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
        shape = MatrixShape(self.shapes[name])
        stored, bits = self._decoded(name, partial(_matrix, shape))
        return tensor_of(bits, stored, shape.dims).to(dtype)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor will have."""
        name = self.aliases.get(name, name)
        told = self._described.get(name)
        return _DTYPES[self._codes[name] if told is None else told["dtype"]]

    def check(self) -> None:
        """Refuse a file whose indices contradict its shapes, or arrays their checksums.

        Raises:
            FileError: The file is damaged.
        """
        for name, described in self._described.items():
            if described["layout"] != "dense":
                shape = MatrixShape(self.shapes[name])
                self._decoded(name, partial(_positions, shape))
        for key in self.arrays if self.has_checksums else ():
            self._read(key)

    @property
    def has_checksums(self) -> bool:
        """Whether the file was written with checksums: those of others are not."""
        return self._sums.told

    def _read_description(self, own: Any) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Return layout and dtype of the packed tensors, and the other names of tied ones."""
        if own is None:
            return self._bitmasks_of_others(), {}
        if not isinstance(own, dict):
            raise self._damaged("its metadata are not what this program writes")
        if own.get("version") != VERSION:
            raise FileError(
                f"{str(self.path)!r} was packed with layouts of version {own.get('version')!r}, "
                f"and this program reads version {VERSION}: install the spartan that wrote it."
            )
        tensors: Any = own.get("tensors", {})
        aliases: Any = own.get("aliases", {})
        texts = is_dict_of(aliases, str) and is_dict_of(tensors, dict)
        if not texts or not all(is_dict_of(told, str) for told in tensors.values()):
            raise self._damaged("its metadata are not what this program writes")
        for name, told in tensors.items():
            layout, code = told.get("layout"), told.get("dtype")
            if code not in _DTYPES or (layout != "dense" and layout not in BY_NAME):
                raise self._unknown(name, f"layout {layout!r} or dtype {code!r}")
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
                    raise self._unknown(name, f"dtype {code!r}")
                described[name] = {"layout": "bitmask", "dtype": code}
                self._keys.discard(f"{name}.row_offsets")
        return described

    def _read_shapes(self) -> dict[str, tuple[int, ...]]:
        left, total = set(self._keys), 0
        self._codes: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, described in self._described.items():
            if described["layout"] == "dense":
                continue
            needed = {f"{name}.{part}" for part in (*BY_NAME[described["layout"]].parts, "shape")}
            if not needed <= left or name in left:
                missing = ", ".join(sorted(needed - left)) or "a name of its own"
                raise self._damaged(f"{name!r} lacks {missing}")
            left -= needed
            shapes[name] = self._read_shape(name)
            stored = str(self._file.get_slice(f"{name}.{VALUES}").get_dtype())
            self._check_claim(name, stored, described["dtype"])
            widest = max(_DTYPES[stored].itemsize, _DTYPES[described["dtype"]].itemsize)
            total += math.prod(shapes[name]) * widest
        self._refuse_larger(total)
        for key in sorted(left):
            view = self._file.get_slice(key)
            code = self._codes[key] = str(view.get_dtype())
            self._check_claim(key, code, self._described.get(key, {}).get("dtype", code))
            shapes[key] = tensor_shape(view.get_shape(), code)
        if not all(name in shapes for name in (*self.aliases.values(), *self._described)):
            raise self._damaged("its metadata name a tensor that is not there")
        if any(name in shapes for name in self.aliases):
            raise self._damaged("two of its tensors have one name")
        return {**shapes, **{name: shapes[first] for name, first in self.aliases.items()}}

    def _check_claim(self, name: str, stored: str, claimed: str) -> None:
        """Refuse unknown dtypes, and values to be returned in a dtype that was never narrowed."""
        if stored not in _DTYPES:
            raise self._unknown(name, f"dtype {stored!r}")
        narrowed = stored in ("F16", "BF16") and claimed in ("F32", "F64")
        if stored != claimed and not narrowed:
            raise self._damaged(f"{name!r} claims to be {claimed}, and its values are {stored}")

    def _refuse_larger(self, total: int) -> None:
        """Refuse to unpack more than a file of this size honestly holds, or a machine has."""
        most = self._max_bytes or max(_SMALL, _FACTOR * self.path.stat().st_size)
        if total > most:
            raise FileError(
                f"{str(self.path)!r} of {self.path.stat().st_size:,} bytes would become "
                f"{total:,} bytes, more than the {most:,} that are allowed: if you trust it, give "
                "max_bytes=."
            )
        try:
            refuse_more_than_memory(total)
        except FileError as error:
            raise FileError(f"{str(self.path)!r} cannot be unpacked: {error}.") from error

    def _read_shape(self, name: str) -> tuple[int, ...]:
        dims = self._read(f"{name}.shape")
        whole = dims.dim() == 1 and dims.dtype in (torch.int64, torch.int32)
        sane = whole and len(dims) <= _MOST_DIMENSIONS and bool((dims >= 0).all())
        # Zero-sized tensors too have strides that must be countable.
        if not sane or math.prod(max(1, d) for d in dims.tolist()) >= 1 << 62:
            raise self._damaged(f"{name!r} has no sensible shape")
        return tuple(dims.tolist())

    def _decoded(
        self, name: str, decode: Callable[[Layout, Parts], NDArray[Any]]
    ) -> tuple[torch.dtype, NDArray[Any]]:
        """Return the dtype of the stored values, and what is made of the arrays of a layout."""
        layout = BY_NAME[self._described[name]["layout"]]
        try:
            stored, parts = self._parts(name)
            return stored, decode(layout, parts)
        except FileError as error:
            raise self._damaged(f"{name!r}: {error}") from error
        except (MemoryError, RuntimeError, ValueError) as error:
            # NumPy and torch refuse shapes that no array can have, each in its own way.
            raise self._damaged(f"{name!r} cannot be decoded: {error}") from error

    def _parts(self, name: str) -> tuple[torch.dtype, Parts]:
        """Return the dtype of the stored values, and the arrays of a layout."""
        layout = BY_NAME[self._described[name]["layout"]]
        values = self._read(f"{name}.{VALUES}")
        parts: Parts = {VALUES: bits_of(values)}
        for part in layout.parts[1:]:
            array = self._read(f"{name}.{part}")
            if array.is_floating_point() or array.is_complex():
                raise FileError(f"{part} is not made of integers")
            parts[part] = array.numpy()
        return values.dtype, parts

    def _read(self, key: str) -> Tensor:
        try:
            return self._sums.read(self._file, key)
        except (FileError, OSError, SafetensorError) as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, reason: str) -> FileError:
        return FileError(f"{str(self.path)!r} is damaged: {reason}.")

    def _unknown(self, name: str, what: str) -> FileError:
        return FileError(
            f"{str(self.path)!r} has the unknown {what} in {name!r}: the program that wrote it may "
            "be newer than this one."
        )

    def _of_another_kind(self) -> FileError | None:
        """Return what to raise of a file that never was a safetensors file."""
        with self.path.open("rb") as file:
            begin = file.read(8)
        # The first eight bytes of a safetensors file are the size of its header.
        if len(begin) < 8 or int.from_bytes(begin, "little") <= _LARGEST_HEADER:
            return None
        kinds = {b"PK": ": torch.load reads the zip files of torch.save",
                 b"GGUF": ", but a GGUF file", b"\x80": ", but perhaps a pickle"}  # fmt: skip
        found = [kind for magic, kind in kinds.items() if begin.startswith(magic)]
        return FileError(f"{str(self.path)!r} is no safetensors file{(found or [''])[0]}.")


def _matrix(shape: MatrixShape, layout: Layout, parts: Parts) -> NDArray[Any]:
    return layout.decode(parts, shape)


def _positions(shape: MatrixShape, layout: Layout, parts: Parts) -> NDArray[Any]:
    return layout.positions(parts, shape)


def is_dict_of(value: Any, kind: type) -> bool:
    """Whether a value is a dict whose values are all of one type."""
    return isinstance(value, dict) and all(isinstance(item, kind) for item in value.values())
