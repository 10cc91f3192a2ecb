"""Flat views of contiguous and channels-last tensors, in memory order.

Elementwise kernels work on any dense tensor, contiguous or channels-last, as one flat run; the
position of an entry is its place in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether the entries fill one run of memory, in the usual order or channels last."""
    if x.is_contiguous():
        return True
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def alike(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are dense and lie in memory in the same order."""
    first = tensors[0]
    if all(x.is_contiguous() for x in tensors):
        return True
    return all(is_dense(x) and x.stride() == first.stride() for x in tensors)


def flat(x: Tensor) -> Tensor:
    """Return the entries in the order of memory, as a view if the tensor is dense."""
    if x.is_contiguous():
        return x.view(-1)
    return x.as_strided((x.numel(),), (1,)) if is_dense(x) else x.flatten()


def unflat(entries: Tensor, like: Tensor) -> Tensor:
    """Return what `flat` would turn into `entries`, in the shape of the tensor they belong to."""
    if like.is_contiguous() or not is_dense(like):
        return entries.view(like.shape)
    return entries.as_strided(like.shape, like.stride())
