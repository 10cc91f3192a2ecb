"""Flat views of tensors that fill one run of memory, in whatever order: by rows, columns, channels.

Elementwise kernels work on any dense tensor as one flat run; the position of an entry is its place
in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SAMPLED = 16  # entries that are compared in every step: as good as free


def is_dense(x: Tensor) -> bool:
    """Whether the entries fill one run of memory without gaps, in any order of dimensions."""
    return x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense.default(x)


def alike(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are dense and lie in memory in the same order."""
    first = tensors[0]
    if all(x.is_contiguous() for x in tensors):
        return True
    return all(is_dense(x) and x.stride() == first.stride() for x in tensors)


def flat(x: Tensor) -> Tensor:
    """Return the entries in the order of memory: to be read; a copy if the tensor has gaps."""
    return flat_view(x) if is_dense(x) else x.flatten()


def flat_view(x: Tensor) -> Tensor:
    """Return the entries of a dense tensor in the order of memory: writing to them writes to it."""
    assert is_dense(x), x.stride()
    return x.view(-1) if x.is_contiguous() else x.as_strided((x.numel(),), (1,))


def unflat(entries: Tensor, like: Tensor) -> Tensor:
    """Return what `flat` would turn into `entries`, in the shape of the tensor they belong to."""
    if like.is_contiguous() or not is_dense(like):
        return entries.view(like.shape)
    return entries.as_strided(like.shape, like.stride())


def sample(x: Tensor) -> Tensor:
    """Return a copy of some entries, spread over the tensor: writes to it mostly show there."""
    entries = flat_view(x) if is_dense(x) else x.select(0, x.shape[0] // 2).flatten()
    return entries[:: max(1, entries.numel() // _SAMPLED)].clone()
