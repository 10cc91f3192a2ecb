"""`Scores`: pruning scores of tensors that share a budget, computed chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from spartan.kernels.memory import alike, flat

# Entries a CPU core handles while their temporaries stay in its cache.
_CHUNK = 1 << 17


def wide(x: Tensor) -> Tensor:
    """Return `x` in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def flat_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of tensors of one shape, part by part, small enough for cheap temporaries."""
    if not alike(tensors):
        yield tensors
        return
    size = chunk_size(tensors[0], tensors[0].numel())
    yield from zip(*(flat(x).split(size) for x in tensors), strict=True)


def chunk_size(like: Tensor, total: int) -> int:
    """Return how many entries to work on at a time, of `total` on the device of `like`."""
    if like.device.type == "cpu":
        return _CHUNK
    # The temporaries of a chunk, at most six floats an entry, stay below 5 % of the tensors.
    return max(1 << 16, total // 128)


@dataclass(frozen=True)
class Scores:
    """Scores u = scale |x|, or scale x, of several tensors that share a budget.

    Attributes:
        tensors: x, floating point, any shapes, one device.
        scales: One positive factor for each tensor.
        costs: For each tensor the cost of an entry; for a single tensor perhaps a tensor of its
            shape.
        absolute: Whether scores are magnitudes.
        dtype: What scores are formed in: float64 if any tensor is, else float32.
        total: Cost of all entries.
    """

    tensors: Sequence[Tensor]
    scales: Sequence[float]
    costs: Sequence[float | Tensor]
    absolute: bool
    dtype: torch.dtype = field(init=False)
    total: float = field(init=False)

    def __post_init__(self) -> None:
        wide = any(x.dtype == torch.float64 for x in self.tensors)
        object.__setattr__(self, "dtype", torch.float64 if wide else torch.float32)
        total = sum(
            float(c.sum(dtype=torch.float64)) if isinstance(c, Tensor) else c * x.numel()
            for x, c in zip(self.tensors, self.costs, strict=True)
        )
        object.__setattr__(self, "total", total)

    @property
    def numels(self) -> list[int]:
        """Number of entries of each tensor."""
        return [x.numel() for x in self.tensors]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.tensors[0].device

    @property
    def plain_costs(self) -> list[float] | None:
        """The costs, if each tensor has one number."""
        plain = [c for c in self.costs if not isinstance(c, Tensor)]
        return plain if len(plain) == len(self.costs) else None

    def part(self, indices: Sequence[int]) -> Scores:
        """Return the scores of some of the tensors."""
        tensors, scales = [self.tensors[i] for i in indices], [self.scales[i] for i in indices]
        part = Scores(tensors, scales, [self.costs[i] for i in indices], self.absolute)
        object.__setattr__(part, "dtype", self.dtype)  # so that thresholds mean the same
        return part

    def of(self, x: Tensor, index: int) -> Tensor:
        """Return the scores of (a part of) one tensor, without negative zeros."""
        u = x.to(self.dtype)
        u = u.abs() if self.absolute else u
        u = u if self.scales[index] == 1.0 else u * self.scales[index]
        return u if self.absolute else u + 0.0

    def pieces(self) -> Iterator[tuple[Tensor, float | Tensor]]:
        """Yield flat scores and the cost of their entries, chunk by chunk.

        Runs of small tensors come joined: working on each alone would cost more in calls than in
        arithmetic.
        """
        size = chunk_size(self.tensors[0], sum(self.numels))
        for kind, run in groupby(range(len(self.tensors)), lambda i: self._kind(i, size)):
            if kind is None:
                for i in run:
                    yield from self._split(i, size)
            else:
                yield from self._joined(list(run), size)

    def _kind(self, i: int, size: int) -> tuple[float, float] | None:
        cost = self.costs[i]
        if isinstance(cost, Tensor) or self.tensors[i].numel() > size // 2:
            return None
        return (self.scales[i], cost)

    def _split(self, i: int, size: int) -> Iterator[tuple[Tensor, float | Tensor]]:
        cost = self.costs[i]
        parts = flat(self.tensors[i]).split(size)
        costs = flat(cost).split(size) if isinstance(cost, Tensor) else [cost] * len(parts)
        for x, c in zip(parts, costs, strict=True):
            yield self.of(x, i), c

    def _joined(self, run: list[int], size: int) -> Iterator[tuple[Tensor, float | Tensor]]:
        batch: list[Tensor] = []
        length = 0
        for i in run:
            if length + self.tensors[i].numel() > size and batch:
                yield self.of(torch.cat(batch), run[0]), self.costs[run[0]]
                batch, length = [], 0
            batch.append(flat(self.tensors[i]).to(self.dtype))
            length += self.tensors[i].numel()
        yield self.of(torch.cat(batch), run[0]), self.costs[run[0]]
