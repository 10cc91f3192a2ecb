"""`RowBundles`: a CSR variant in which 1, 4, 8 or 16 rows share their column indices.

With bundles of one row this is CSR. Weights pruned in blocks fill higher bundles, and every input
that is read then serves several outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Those that products.h has loops for. The highest that is full enough reads inputs least often.
HEIGHTS = (16, 8, 4, 1)
# Smallest fraction of nonzeros among the entries of bundles (the rest are stored zeros) at which
# higher bundles still beat single rows.
_FULL_ENOUGH = 0.8


@dataclass(frozen=True, eq=False)
class RowBundles:
    """A matrix of (outputs, inputs).

    Attributes:
        values: float32, (entries, height): one column of one bundle each, by bundle, then column.
        columns: int32, (entries,).
        starts: int32, (bundles + 1,): where each bundle's entries begin.
        outputs: Number of rows; the last bundle may stick out.
        inputs: Number of columns.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    outputs: int
    inputs: int

    @property
    def height(self) -> int:
        """Rows in a bundle."""
        return self.values.shape[1]

    @property
    def count(self) -> int:
        """Number of bundles."""
        return self.starts.numel() - 1

    def bundle_of_entry(self) -> Tensor:
        """Return the bundle of each entry, int64."""
        bundles = torch.arange(self.count, device=self.starts.device)
        return torch.repeat_interleave(bundles, self.starts.diff().long())

    def dense(self) -> Tensor:
        """Return the matrix, float32, (outputs, inputs)."""
        tall = self.values.new_zeros(self.count, self.height, self.inputs)
        tall[self.bundle_of_entry(), :, self.columns.long()] = self.values
        return tall.flatten(0, 1)[: self.outputs]


def bundle(matrix: Tensor, height: int | None = None) -> RowBundles:
    """Keep the nonzeros of a matrix.

    Args:
        matrix: float32, (outputs, inputs).
        height: Rows in a bundle; by default the largest that its nonzeros fill.
    """
    if height is None:
        height = best_height(matrix)
    outputs, inputs = matrix.shape
    tall = _tall(matrix, height)
    used = (tall != 0).any(1)
    where, columns = used.nonzero(as_tuple=True)
    counts = used.sum(1)
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, out=starts[1:])
    values = tall[where, :, columns].contiguous()
    return RowBundles(values, columns.int(), starts, outputs, inputs)


def best_height(matrix: Tensor) -> int:
    """Return the largest bundle height that the nonzeros fill to 80 %."""
    nonzeros = int(torch.count_nonzero(matrix))
    for height in HEIGHTS[:-1]:
        used = int(torch.count_nonzero((_tall(matrix, height) != 0).any(1)))
        if nonzeros and nonzeros >= _FULL_ENOUGH * used * height:
            return height
    return 1


def _tall(matrix: Tensor, height: int) -> Tensor:
    """Return (bundles, height, inputs), with rows of zeros at the end if needed."""
    outputs, inputs = matrix.shape
    missing = -outputs % height
    if missing:
        matrix = torch.cat([matrix, matrix.new_zeros(missing, inputs)])
    return matrix.reshape(-1, height, inputs)
