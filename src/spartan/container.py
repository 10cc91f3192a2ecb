"""Writes safetensors files array by array, with checksums; dtype codes and memory checks.

The safetensors library writes a file from tensors that are all in memory, and its metadata in any
order. The format is an 8-byte length, a JSON header and the data, so a file can be written as it is
encoded, and equal contents make equal files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spartan import checksums
from spartan.errors import FileError

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float4_e2m1fn_x2: "F4",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Dtypes whose zero is no bits at all, and whose minus zero is the sign bit alone, if they have one.
# Others are stored as they are: without them, zeros could not be left out.
WITH_PLAIN_ZEROS = frozenset(CODES) - {
    *(torch.complex64, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    torch.float4_e2m1fn_x2,
}
_AS_SIGNED = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    torch.float4_e2m1fn_x2: torch.uint8,
}
_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Entry:
    """One array of a file: what the header says of it."""

    name: str
    code: str
    shape: tuple[int, ...]
    nbytes: int


def write_file(
    path: Path,
    entries: list[Entry],
    metadata: Mapping[str, str],
    arrays: Callable[[], Iterable[NDArray[np.generic]]],
) -> None:
    """Write a safetensors file with checksums.

    Args:
        path: The file.
        entries: All arrays of the file, in order.
        metadata: Text to text.
        arrays: Called once; yields the arrays in the same order.
    """
    # Sums have a fixed width: the header is written again, in its place, when they are known.
    sums = {entry.name: "0" * 8 for entry in entries}
    with path.open("wb") as file:
        file.write(_header(entries, metadata, sums))
        for entry, array in zip(entries, arrays(), strict=True):
            data = _bytes(array)
            sums[entry.name] = checksums.of_array(entry.name, entry.code, entry.shape, data)
            file.write(data)
        file.seek(0)
        file.write(_header(entries, metadata, sums))


def _header(
    entries: Sequence[Entry], metadata: Mapping[str, str], sums: Mapping[str, str]
) -> bytes:
    told = checksums.of_metadata(metadata) + "".join(sums[name] for name in sorted(sums))
    header: dict[str, object] = {
        "__metadata__": dict(sorted({**metadata, checksums.KEY: told}.items()))
    }
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": entry.code,
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin on a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _bytes(array: NDArray[np.generic]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def bits_of(tensor: Tensor) -> NDArray[np.generic]:
    """Return a tensor's bits as unsigned integers, in its shape."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    signed = plain.view(_SIGNED[plain.element_size()]).numpy()
    return signed.view(f"u{plain.element_size()}")


def tensor_of(bits: NDArray[np.generic], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of these bits."""
    size = bits.dtype.itemsize
    signed = bits.view("u1" if size == 1 else f"i{size}")
    return torch.from_numpy(np.ascontiguousarray(signed)).view(dtype).reshape(shape)


def count_nonzero(tensor: Tensor) -> int:
    """Return how many entries are not zero, of any dtype: torch does not count all of them."""
    if tensor.dtype in _AS_SIGNED:
        tensor = tensor.view(_AS_SIGNED[tensor.dtype])
    narrow = tensor.is_floating_point() and tensor.element_size() == 1
    return int(torch.count_nonzero(tensor.float() if narrow else tensor))


def header_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return a tensor's shape as a header has it: floats of four bits count one by one."""
    shape = tuple(tensor.shape)
    if tensor.dtype is torch.float4_e2m1fn_x2:
        return (*shape[:-1], 2 * shape[-1])
    return shape


def entry_of(name: str, tensor: Tensor) -> Entry:
    """Return what a header says of a tensor that is stored as it is."""
    if tensor.dtype not in CODES:
        raise FileError(f"A safetensors file cannot hold {name!r}, which is {tensor.dtype}.")
    size = tensor.numel() * tensor.element_size()
    return Entry(name, CODES[tensor.dtype], header_shape(tensor), size)


def tensor_shape(shape: Sequence[int], code: str) -> tuple[int, ...]:
    """Return the shape of the tensor that a header describes."""
    if code == "F4" and shape:
        return (*shape[:-1], shape[-1] // 2)
    return tuple(shape)


def refuse_more_than_memory(dense_bytes: int) -> None:
    """Refuse to make tensors that this machine has no memory for.

    Raises:
        FileError: A file's shapes are absurd.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return
    if dense_bytes > memory:
        raise FileError(
            f"its shapes ask for {dense_bytes:,} bytes, and this machine has {memory:,}"
        )


def chunks_of(tensors: Iterable[Tensor], size: int = 1 << 22) -> Iterator[memoryview]:
    """Yield the bytes of tensors, piece by piece."""
    for tensor in tensors:
        data = _bytes(bits_of(tensor))
        for begin in range(0, len(data), size):
            yield data[begin : begin + size]
