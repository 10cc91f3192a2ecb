"""Many small tensors cost what one tensor of their total size costs: they are worked on joined."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

# Tensors are joined up to this many entries; larger ones are never copied.
_LIMIT = 1 << 20


class Packing:
    """Joins runs of small tensors with equal costs, and splits results back.

    Args:
        like: The tensors, whose sizes count.
        costs: For each the cost of an entry.

    Attributes:
        costs: For each joined tensor the cost of an entry.
    """

    def __init__(self, like: Sequence[Tensor], costs: Sequence[float]) -> None:
        self._shapes = [t.shape for t in like]
        starts = [0] if like else []
        size = 0
        for i, tensor in enumerate(like):
            size += tensor.numel()
            if i and (size > _LIMIT or costs[i] != costs[i - 1]):
                starts.append(i)
                size = tensor.numel()
        self._runs = [range(a, b) for a, b in pairwise([*starts, len(like)])]
        self.costs = [costs[run[0]] for run in self._runs]

    def join(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return flat tensors, fewer and in the same order."""
        return [
            tensors[run[0]].flatten()
            if len(run) == 1
            else torch.cat([tensors[i].flatten() for i in run])
            for run in self._runs
        ]

    def split(self, joined: Sequence[Tensor]) -> list[Tensor]:
        """Return views of joined tensors in the original shapes."""
        parts: list[Tensor] = []
        for tensor, run in zip(joined, self._runs, strict=True):
            shapes = [self._shapes[i] for i in run]
            pieces = tensor.split([shape.numel() for shape in shapes])
            parts += [p.view(shape) for p, shape in zip(pieces, shapes, strict=True)]
        return parts
