"""Membership and merging of sorted int64 key lists, as of the pairs of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from spartan.kernels.dispatch import native_module


def is_in(keys: Tensor, known: Tensor) -> Tensor:
    """Say which keys are among the known ones; both are sorted."""
    if known.numel() == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    native = native_module() if keys.device.type == "cpu" else None
    if native is not None:
        keys, known = keys.contiguous(), known.contiguous()
        found = torch.empty_like(keys, dtype=torch.bool)
        native.connections_members(keys=keys, known=known, found=found)
        return found
    place = torch.searchsorted(known, keys).clamp_(max=known.numel() - 1)
    return known[place] == keys


def merge(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two rising lists that share nothing.

    Returns:
        The merged list, and where the entries of the first one are in it.
    """
    merged = first.new_empty(first.numel() + second.numel())
    native = native_module() if first.device.type == "cpu" else None
    if native is not None:
        first, second, places = first.contiguous(), second.contiguous(), torch.empty_like(first)
        native.connections_merge(first=first, second=second, merged=merged, places=places)
        return merged, places
    of_second = torch.searchsorted(first, second)
    of_second += torch.arange(second.numel(), device=second.device)
    of_first = torch.ones_like(merged, dtype=torch.bool)
    of_first[of_second] = False
    places = of_first.nonzero()[:, 0]
    merged[places], merged[of_second] = first, second
    return merged, places
