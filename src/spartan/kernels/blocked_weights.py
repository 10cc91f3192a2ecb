"""`BlockedWeights`: sparse weights split by input into cache-sized blocks, for inference.

The native layers read activations as z: rows of lanes, one lane per output position. Entries hold
how far, in floats, their input lies behind the first one of its block; a block is as many inputs as
have their rows of z in the first-level cache, and at most 65,536 floats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spartan.kernels.row_bundles import RowBundles

# Floats of z that may be in use at a time: 64 KiB. The sums of wide rows hide what misses the
# first-level cache; those of narrow ones do not.
_CACHE, _CACHE_OF_NARROW = 1 << 14, 1 << 13
_NARROW = 16  # lanes: one vector of AVX-512
# Entries of a bundle that a block must hold: each block costs one more pass over the sums.
_WORTH = 32
_REACH = 1 << 16  # what 16 bits can address
SLICE = 16


@dataclass(frozen=True, eq=False)
class BlockedWeights:
    """Weights as `native/layers.h` wants them: bundles of one block after the other.

    Attributes:
        values: float32, (entries, height).
        offsets: uint16 kept as int16, (entries,).
        starts: int32, (blocks x bundles + 1,).
        bases: int64, (blocks,): where each block begins in z.
        lanes: Lanes to compute at a time.
    """

    values: Tensor
    offsets: Tensor
    starts: Tensor
    bases: Tensor
    lanes: int


@dataclass(frozen=True)
class Geometry:
    """A convolution on inputs of one size; the numbers of `Convolution` in `native/layers.h`."""

    channels: int
    rows: int
    images: int
    columns: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    threads: int = 1

    @cached_property
    def out_rows(self) -> int:
        """Rows of the output."""
        return self._out(self.rows, 0)

    @cached_property
    def out_columns(self) -> int:
        """Columns of the output."""
        return self._out(self.columns, 1)

    def _out(self, size: int, axis: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1)
        return (size + 2 * self.padding[axis] - reach - 1) // self.stride[axis] + 1

    @cached_property
    def group(self) -> int:
        """Images whose rows are interleaved, so that a row of z fills vectors."""
        return min(self.images, max(1, 16 // self.out_columns))

    @cached_property
    def row_size(self) -> int:
        """Floats in a row of z."""
        return self.group * self.out_columns

    @cached_property
    def reach(self) -> int:
        """How far the last kernel row lies behind the first."""
        return (self.kernel[0] - 1) * self.dilation[0]

    @cached_property
    def phases(self) -> int:
        """Input rows are kept apart by their place within the stride."""
        return min(self.stride[0], self.reach + 1)

    @cached_property
    def height(self) -> int:
        """Output rows to compute on one z; 0 if the rows are too wide for 16-bit offsets."""
        row = self.phases * self.row_size * self.kernel[1]
        addressable = _REACH // row - self.reach // self.stride[0]
        # Few enough for the second-level cache, but enough to fill vectors.
        room = max((1 << 17) // (self.channels * row), 128 // self.row_size, 1)
        most = min(self.out_rows, room, addressable)
        items = math.ceil(self.images / self.group)
        if items < self.threads and self.out_rows * self.row_size >= 64 * self.threads:
            most = min(most, math.ceil(self.out_rows * items / self.threads))
        return math.ceil(self.out_rows / math.ceil(self.out_rows / most)) if most > 0 else 0

    @cached_property
    def plane(self) -> int:
        """Floats of z per channel and kernel column."""
        return self.phases * (self.height + self.reach // self.stride[0]) * self.row_size


def lanes_for(positions: int, height: int, most: int = 64) -> int:
    """Return how many lanes to compute at a time."""
    return min(most if height == 1 else 32, math.ceil(positions / SLICE) * SLICE)


def block_for_samples(w: RowBundles, positions: int) -> BlockedWeights:
    """Return the weights in blocks, for a number of samples."""
    lanes = lanes_for(positions, w.height)
    cache = _CACHE if w.height == 1 else _REACH
    # Every block costs a pass over the sums: few entries are not worth it.
    worth = _WORTH * w.count * w.inputs // max(1, w.columns.numel())
    per_block = max(1, min(max(cache // lanes, worth), _REACH // lanes))
    columns = w.columns.long()
    return _blocked(w, columns // per_block, columns % per_block * lanes, per_block * lanes, lanes)


def block_for_images(w: RowBundles, g: Geometry) -> BlockedWeights:
    """Return the weights in blocks; columns are (channel, kernel row, kernel column)."""
    kernel_rows, kernel_columns = g.kernel
    stride, row_size, plane = g.stride[0], g.row_size, g.plane
    lanes = lanes_for(g.height * row_size, w.height, 128)
    rows_at_once = math.ceil(lanes / row_size) + g.reach // stride
    touched = kernel_columns * g.phases * rows_at_once * row_size
    cache = _CACHE_OF_NARROW if lanes <= _NARROW else _CACHE
    # Higher bundles read each input for several outputs, so that the second-level cache will do.
    cache = cache if w.height == 1 else _REACH
    per_block = max(1, min(cache // touched, _REACH // (plane * kernel_columns)))
    columns = w.columns.long()
    channel = columns // (kernel_rows * kernel_columns)
    row = columns // kernel_columns % kernel_rows * g.dilation[0]
    offset = (channel % per_block * kernel_columns + columns % kernel_columns) * plane
    offset += (row % stride * (plane // g.phases // row_size) + row // stride) * row_size
    return _blocked(w, channel // per_block, offset, per_block * kernel_columns * plane, lanes)


def _blocked(
    w: RowBundles, block: Tensor, offset: Tensor, block_size: int, lanes: int
) -> BlockedWeights:
    blocks = int(block.max()) + 1 if block.numel() else 1
    place = block * w.count + w.bundle_of_entry()
    order = torch.argsort(place, stable=True)
    counts = torch.bincount(place, minlength=blocks * w.count)
    starts = torch.zeros(blocks * w.count + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, out=starts[1:])
    return BlockedWeights(
        values=w.values[order].contiguous(),
        offsets=offset[order].int().to(torch.int16),
        starts=starts,
        bases=torch.arange(blocks) * block_size,
        lanes=lanes,
    )


@dataclass(frozen=True, eq=False)
class Slices:
    """Weights for one sample: slices of 16 rows of similar length, one entry of each per step.

    Attributes:
        values: float32, (steps, 16).
        columns: uint16 kept as int16, (steps, 16), or (steps,) if a step's rows share their column.
        starts: int32, (slices + 1,).
        rows: int32, (slices, 16): which rows; -1 for none. Empty if in order.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    rows: Tensor


def slice_rows(w: RowBundles) -> Slices:
    """Return the weights in slices, for one sample."""
    if w.height == SLICE:
        rows = torch.empty(0, dtype=torch.int32)
        return Slices(w.values, w.columns.to(torch.int16), w.starts, rows)
    matrix = w.dense()
    used = matrix != 0
    lengths = used.sum(1)
    order = torch.argsort(lengths, stable=True, descending=True)
    missing = -w.outputs % SLICE
    rows = torch.cat([order, order.new_full((missing,), -1)]).view(-1, SLICE)
    steps = lengths[rows[:, 0]]  # the longest row of each slice comes first
    starts = torch.zeros(len(rows) + 1, dtype=torch.int64)
    torch.cumsum(steps, 0, out=starts[1:])
    values = torch.zeros(int(starts[-1]), SLICE)
    columns = torch.zeros(int(starts[-1]), SLICE, dtype=torch.int16)
    row, column = used.nonzero(as_tuple=True)
    first = torch.zeros(w.outputs, dtype=torch.int64)
    torch.cumsum(lengths[:-1], 0, out=first[1:])
    nth = torch.arange(len(row)) - first[row]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    step = starts[rank[row] // SLICE] + nth
    values[step, rank[row] % SLICE] = matrix[row, column]
    columns[step, rank[row] % SLICE] = column.int().to(torch.int16)
    return Slices(values, columns, starts.int(), rows.int())
