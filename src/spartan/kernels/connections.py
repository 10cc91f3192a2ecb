"""`Connections`: the CSR index of an always-sparse layer, sorted by output and by input."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spartan.errors import KernelError
from spartan.kernels.dispatch import Native, native_module

if TYPE_CHECKING:
    from spartan.kernels._native import Kernels

# Rows that are gathered stay in the second-level cache if they take up to so many bytes.
_CACHE = 1 << 20
# With fewer connections of a line in a block, or of a line at all, reading the sums again for each
# block costs more than the cache saves.
_FEW_IN_BLOCK, _FEW = 4, 16


@dataclass(frozen=True, eq=False)
class Lines:
    """Connections sorted by one end, the line, and within a line by the other end.

    Attributes:
        starts: int32, (lines + 1,): where the connections of each line begin.
        others: int32, (connections,): the other end of each.
        ends: How many other ends there are.
        order: int32, (connections,): the place of each among those sorted by output; None if they
            are.
    """

    starts: Tensor
    others: Tensor
    ends: int
    order: Tensor | None = None
    _made: dict[int, Kernels.ConnectionLines] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of lines."""
        return self.starts.numel() - 1

    def blocks(self, lanes: int) -> int:
        """Return into how many blocks the other ends are divided for rows of so many samples."""
        per_line = self.others.numel() / max(1, self.count)
        blocks = -(-self.ends * lanes * 4 // _CACHE)
        worth = per_line >= max(_FEW, blocks * _FEW_IN_BLOCK)
        return blocks if worth else 1

    def native(self, module: Native, lanes: int) -> Kernels.ConnectionLines:
        """Return what the native loops work on, for rows of so many samples; kept once made."""
        blocks = self.blocks(lanes)
        if blocks not in self._made:
            self._made[blocks] = module.ConnectionLines(
                starts=self.starts,
                others=self.others,
                order=self.order,
                ends=self.ends,
                blocks=blocks,
                threads=torch.get_num_threads(),
            )
        return self._made[blocks]


class Connections:
    """Connections of a layer, sorted by output and then by input; never changed.

    Args:
        starts: int32, (outputs + 1,): where the connections of each output begin.
        columns: int32, (connections,): the input of each, rising within an output.
        inputs: Number of inputs.

    Raises:
        KernelError: The tensors are not such an index.
    """

    def __init__(self, starts: Tensor, columns: Tensor, inputs: int) -> None:
        _check(starts, columns, inputs)
        self.inputs = inputs
        self._checksums: tuple[int, int] | None = None  # once they are used
        self.by_output = Lines(starts, columns, inputs)

    @classmethod
    def from_keys(cls, keys: Tensor, outputs: int, inputs: int) -> Connections:
        """Make connections of int64 keys output * inputs + input, sorted and distinct."""
        bounds = torch.arange(outputs + 1, device=keys.device) * inputs
        starts = torch.searchsorted(keys, bounds, out_int32=True)
        return cls(starts, (keys % inputs).int(), inputs)

    @property
    def starts(self) -> Tensor:
        """int32, (outputs + 1,): where the connections of each output begin."""
        return self.by_output.starts

    @property
    def columns(self) -> Tensor:
        """int32, (connections,): the input of each."""
        return self.by_output.others

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return self.by_output.count

    @property
    def count(self) -> int:
        """Number of connections."""
        return self.columns.numel()

    @property
    def pairs(self) -> int:
        """Number of pairs that could be connected."""
        return self.outputs * self.inputs

    @property
    def fan_in(self) -> Tensor:
        """int32, (outputs,): inputs of each output."""
        return self.starts.diff()

    def rows(self) -> Tensor:
        """Return the output of each connection, int64."""
        lines = torch.arange(self.outputs, device=self.starts.device)
        return lines.repeat_interleave(self.fan_in.long(), output_size=self.count)

    def keys(self) -> Tensor:
        """Return output * inputs + input of each connection: int64, rising."""
        return self.rows() * self.inputs + self.columns

    def dense(self, values: Tensor) -> Tensor:
        """Return the matrix of one value for each connection: (outputs, inputs)."""
        matrix = values.new_zeros(self.pairs)
        matrix[self.keys()] = values
        return matrix.view(self.outputs, self.inputs)

    @cached_property
    def by_input(self) -> Lines:
        """The same connections sorted by input, then by output."""
        columns, outputs = self.columns, self.outputs
        native = native_module() if columns.device.type == "cpu" else None
        if native is None:
            order = torch.argsort(columns, stable=True)
            bounds = torch.arange(self.inputs + 1, device=columns.device, dtype=torch.int32)
            starts = torch.searchsorted(columns[order], bounds, out_int32=True)
            return Lines(starts, self.rows()[order].int(), outputs, order.int())
        starts = torch.empty(self.inputs + 1, dtype=torch.int32, device="cpu")
        rows, order = torch.empty_like(columns), torch.empty_like(columns)
        native.connections_transpose(
            starts=self.starts,
            others=columns,
            column_starts=starts,
            column_lines=rows,
            order=order,
        )
        return Lines(starts, rows, outputs, order)

    def require_unchanged(self) -> None:
        """Refuse to go on if the indices are not those that were checked.

        Writes through `.data`, or through NumPy, change no version of a tensor. Native code would
        read what is not there, and the connections sorted by input would be others than these.
        Without native code torch looks at each index itself.

        Raises:
            KernelError: They were written into since the first call.
        """
        native = native_module() if self.columns.device.type == "cpu" else None
        if native is None:
            return
        found = (
            native.connections_checksum(indices=self.starts),
            native.connections_checksum(indices=self.columns),
        )
        if self._checksums is None:
            _check(self.starts, self.columns, self.inputs)
            self._checksums = found
        elif self._checksums != found:
            raise KernelError(
                "The indices of these connections have been written into, past torch's notice "
                "(through .data or NumPy). Restore them, or load a state dict to take others."
            )

    @property
    def order(self) -> Tensor:
        """int32, (connections,): where those of `by_input` are in the order of `columns`."""
        assert self.by_input.order is not None
        return self.by_input.order


def _check(starts: Tensor, columns: Tensor, inputs: int) -> None:
    problem = _problem(starts, columns, inputs)
    if problem:
        raise KernelError(f"These are not the connections of {inputs:,} inputs: {problem}.")


def _problem(starts: Tensor, columns: Tensor, inputs: int) -> str:
    for name, tensor in (("row_starts", starts), ("columns", columns)):
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
            return f"{name} is not a contiguous int32 vector"
    if starts.numel() < 1 or int(starts[0]) != 0 or int(starts[-1]) != columns.numel():
        return f"row_starts does not lead from 0 to the {columns.numel():,} entries of columns"
    if bool((starts.diff() < 0).any()):
        return "row_starts falls"
    if columns.numel() == 0:
        return ""
    if int(columns.min()) < 0 or int(columns.max()) >= inputs:
        return "a column is out of range"
    falls = columns.diff() <= 0
    firsts = starts[1:-1].long()
    firsts = firsts[(firsts > 0) & (firsts < columns.numel())]
    falls[firsts - 1] = False  # from one row to the next
    return "the columns of a row are not rising" if bool(falls.any()) else ""
