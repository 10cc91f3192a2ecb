"""Storage layouts of sparse tensors in files: bitmask, gaps, CSR columns, blocks, 2:4.

A tensor is seen as a matrix of (first dimension, all others) and as bits: what is kept is what has
any bit set, so that the round trip is exact for every dtype. Each layout writes `compressed`, the
kept values in order, and arrays that say where they belong.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spartan.budgets.packed_size import STORED_BLOCKS
from spartan.errors import FileError

Bits = NDArray[np.generic]  # unsigned integers as wide as the values
Parts = dict[str, NDArray[np.generic]]
VALUES = "compressed"


class Layout(ABC):
    """One way to store a matrix."""

    name: str
    parts: tuple[str, ...]

    @abstractmethod
    def encode(self, matrix: Bits) -> Parts | None:
        """Return the arrays to store, or None if the matrix does not fit the layout."""

    @abstractmethod
    def positions(
        self, parts: Mapping[str, NDArray[np.generic]], shape: MatrixShape
    ) -> NDArray[np.int64]:
        """Return where in the flat matrix each value belongs.

        Raises:
            FileError: The arrays contradict each other or the shape.
        """

    def decode(self, parts: Mapping[str, NDArray[np.generic]], shape: MatrixShape) -> Bits:
        """Return the matrix.

        Raises:
            FileError: The arrays contradict each other or the shape.
        """
        values = parts[VALUES].reshape(-1)
        flat = np.zeros(shape.rows * shape.columns, values.dtype)
        flat[self.positions(parts, shape)] = values
        return flat.reshape(shape.rows, shape.columns)


@dataclass(frozen=True)
class MatrixShape:
    """A tensor's shape as a matrix."""

    dims: tuple[int, ...]

    @property
    def rows(self) -> int:
        """First dimension; 1 for a scalar."""
        return self.dims[0] if self.dims else 1

    @property
    def columns(self) -> int:
        """Entries in a row."""
        return math.prod(self.dims[1:])


class Bitmask(Layout):
    """One bit per entry, rows padded to bytes, lowest bit first."""

    name = "bitmask"
    parts = (VALUES, "bitmask")

    def encode(self, matrix: Bits) -> Parts | None:
        used = matrix != 0
        return {VALUES: matrix[used], "bitmask": np.packbits(used, axis=1, bitorder="little")}

    def positions(
        self, parts: Mapping[str, NDArray[np.generic]], shape: MatrixShape
    ) -> NDArray[np.int64]:
        bitmask = _indices(parts, "bitmask", 2, np.uint8)
        fits = bitmask.shape == (shape.rows, -(-shape.columns // 8))
        _require(fits, "its bitmask does not have the size of its shape")
        used = np.unpackbits(bitmask, axis=1, bitorder="little")
        _require(not used[:, shape.columns :].any(), "its bitmask has bits past the end of a row")
        return _as_many(np.flatnonzero(used[:, : shape.columns]), parts)


class Columns(Layout):
    """CSR with 16-bit columns: for rows of at most 65,536 entries."""

    name = "columns"
    parts = (VALUES, "columns", "row_starts")

    def encode(self, matrix: Bits) -> Parts | None:
        if matrix.shape[1] > 1 << 16:
            return None
        rows, columns = np.nonzero(matrix)
        starts = np.zeros(len(matrix) + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=len(matrix)), out=starts[1:])
        small = starts[-1] < 1 << 31
        return {
            VALUES: matrix[rows, columns],
            "columns": columns.astype(np.uint16),
            "row_starts": starts.astype(np.int32) if small else starts,
        }

    def positions(
        self, parts: Mapping[str, NDArray[np.generic]], shape: MatrixShape
    ) -> NDArray[np.int64]:
        columns = _indices(parts, "columns", 1, np.uint16).astype(np.int64)
        starts = _indices(parts, "row_starts", 1, np.int32, np.int64).astype(np.int64)
        _require(starts.shape == (shape.rows + 1,), "its row starts do not fit its shape")
        # Before any difference, which could overflow.
        rising = starts[0] == 0 and bool((starts[1:] >= starts[:-1]).all())
        fits = rising and starts[-1] == len(columns)
        _require(fits, "its row starts do not rise from 0 to the number of its columns")
        _require(not len(columns) or columns.max() < shape.columns, "a column is out of range")
        rows = np.repeat(np.arange(shape.rows), np.diff(starts))
        return _as_many(_rising(rows * shape.columns + columns), parts)


class Gaps(Layout):
    """How many zeros lie before each kept value, in 8 or 16 bits.

    Where there are more than fit, a kept zero stands in between.
    """

    name = "gaps"
    parts = (VALUES, "gaps")

    def encode(self, matrix: Bits) -> Parts | None:
        flat = matrix.reshape(-1)
        where = np.flatnonzero(flat)
        return min(
            (self._with(flat, where, dtype) for dtype in (np.uint8, np.uint16)), key=stored_bytes
        )

    @staticmethod
    def _with(flat: Bits, where: NDArray[np.int64], dtype: type[np.unsignedinteger]) -> Parts:
        most = int(np.iinfo(dtype).max)
        gaps = np.diff(where, prepend=-1) - 1
        fillers = gaps // (most + 1)
        if not fillers.any():
            return {VALUES: flat[where], "gaps": gaps.astype(dtype)}
        places = np.arange(len(where)) + np.cumsum(fillers)
        total = int(places[-1]) + 1
        stored = np.full(total, most, dtype)
        values = np.zeros(total, flat.dtype)
        stored[places] = gaps % (most + 1)
        values[places] = flat[where]
        return {VALUES: values, "gaps": stored}

    def positions(
        self, parts: Mapping[str, NDArray[np.generic]], shape: MatrixShape
    ) -> NDArray[np.int64]:
        gaps = _indices(parts, "gaps", 1, np.uint8, np.uint16)
        where = np.cumsum(gaps.astype(np.int64) + 1) - 1
        inside = not len(where) or where[-1] < shape.rows * shape.columns
        _require(inside, "its gaps lead past its end")
        return _as_many(where, parts)


class Blocks(Layout):
    """Whole blocks of rows x columns, and one bit per block."""

    name = "blocks"
    parts = (VALUES, "block_bitmask")

    def encode(self, matrix: Bits) -> Parts | None:
        used = matrix != 0
        best: tuple[int, tuple[int, int], NDArray[np.bool_]] | None = None
        for size in STORED_BLOCKS:
            if _divides(size, matrix.shape):
                # Rows first: that reads memory in order.
                rows = used.reshape(-1, size[0], used.shape[1]).any(1)
                some = rows.reshape(len(rows), -1, size[1]).any(2)
                bytes_kept = int(np.count_nonzero(some)) * size[0] * size[1] * matrix.itemsize
                total = bytes_kept + some.shape[0] * -(-some.shape[1] // 8)
                if best is None or total < best[0]:
                    best = total, size, some
        if best is None:
            return None
        _, size, some = best
        return {
            VALUES: _blocks(matrix, size)[some],
            "block_bitmask": np.packbits(some, axis=1, bitorder="little"),
        }

    def positions(
        self, parts: Mapping[str, NDArray[np.generic]], shape: MatrixShape
    ) -> NDArray[np.int64]:
        values, bitmask = parts[VALUES], _indices(parts, "block_bitmask", 2, np.uint8)
        whole = values.ndim == 3 and _divides(values.shape[1:], (shape.rows, shape.columns))
        _require(whole, "its blocks do not divide its shape")
        rows, columns = (int(n) for n in values.shape[1:])
        grid = MatrixShape((shape.rows // rows, shape.columns // columns))
        one_each = {VALUES: values[:, 0, 0], "bitmask": bitmask}
        used = Bitmask().positions(one_each, grid)
        corner = used // grid.columns * rows * shape.columns + used % grid.columns * columns
        inside = np.arange(rows)[:, None] * shape.columns + np.arange(columns)
        return np.asarray((corner[:, None, None] + inside).reshape(-1))


class TwoOfFour(Layout):
    """Two values of every four, and their places in two bits each.

    `places` holds two groups of four per byte, the first in the low half: place of the first value,
    then of the second.
    """

    name = "2:4"
    parts = (VALUES, "places")

    def encode(self, matrix: Bits) -> Parts | None:
        if matrix.shape[1] % 8 or not matrix.size:
            return None
        groups = matrix.reshape(-1, 4)
        used = groups != 0
        if (used.sum(1) > 2).any():
            return None
        # The kept ones first, filled up with zeros to two; in order of place.
        places = np.sort(np.argsort(~used, axis=1, kind="stable")[:, :2], axis=1)
        codes = (places[:, 0] | places[:, 1] << 2).astype(np.uint8).reshape(-1, 2)
        rows = len(matrix)
        return {
            VALUES: np.take_along_axis(groups, places, 1).reshape(rows, -1),
            "places": (codes[:, 0] | codes[:, 1] << 4).reshape(rows, -1),
        }

    def positions(
        self, parts: Mapping[str, NDArray[np.generic]], shape: MatrixShape
    ) -> NDArray[np.int64]:
        packed = _indices(parts, "places", 2, np.uint8)
        fits = packed.size * 8 == shape.rows * shape.columns
        _require(fits, "its places do not have the size of its shape")
        flat = packed.reshape(-1)
        codes = np.stack([flat & 15, flat >> 4], 1).reshape(-1)
        places = np.stack([codes & 3, codes >> 2], 1).astype(np.int64)
        places += np.arange(len(codes))[:, None] * 4
        return _as_many(_rising(places.reshape(-1)), parts)


# In order of preference where several are equally small.
LAYOUTS: tuple[Layout, ...] = (TwoOfFour(), Blocks(), Bitmask(), Columns(), Gaps())


def smallest(matrix: Bits, description: int) -> tuple[Layout, Parts] | None:
    """Return the smallest layout of a matrix, or None if dense is as small.

    Args:
        matrix: The bits.
        description: Bytes that each array takes in the file besides its data.
    """
    best: tuple[Layout, Parts] | None = None
    size = matrix.nbytes
    if size <= description:
        return None
    for layout in LAYOUTS:
        parts = layout.encode(matrix)
        if parts is not None and stored_bytes(parts, description) < size:
            best, size = (layout, parts), stored_bytes(parts, description)
    return best


def stored_bytes(parts: Parts, description: int = 0) -> int:
    """Return what the arrays take in a file."""
    return sum(array.nbytes + description for array in parts.values())


def _blocks(matrix: Bits, size: tuple[int, int]) -> Bits:
    """Return (block rows, block columns, rows, columns)."""
    rows, columns = size
    tall, wide = matrix.shape
    return matrix.reshape(tall // rows, rows, wide // columns, columns).swapaxes(1, 2)


def _divides(size: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return all(s > 0 and n > 0 and n % s == 0 for s, n in zip(size, shape, strict=True))


def _as_many(
    where: NDArray[np.int64], parts: Mapping[str, NDArray[np.generic]]
) -> NDArray[np.int64]:
    _require(len(where) == parts[VALUES].size, "it has not as many values as places for them")
    return where


def _rising(where: NDArray[np.int64]) -> NDArray[np.int64]:
    _require(
        bool((np.diff(where) > 0).all()), "two values have the same place, or are out of order"
    )
    return where


def _indices(
    parts: Mapping[str, NDArray[np.generic]], name: str, dimensions: int, *dtypes: type[Any]
) -> NDArray[Any]:
    """Return an array of indices, of a dtype that `encode` writes and with none below zero."""
    array: NDArray[Any] = parts[name]
    written = array.dtype in dtypes and array.ndim == dimensions
    _require(written, f"{name} is {array.dtype} in {array.ndim} dimensions, which nobody writes")
    _require(not array.size or int(array.min()) >= 0, f"a number in {name} is out of range")
    return array


def _require(condition: object, reason: str) -> None:
    if not condition:
        raise FileError(reason)
