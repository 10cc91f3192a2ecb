"""Checks tensors for NaN and infinity, with at most one device synchronisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spartan.kernels.dispatch import native_for
from spartan.kernels.readback import read_back


def finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Say of each tensor whether all entries are finite, with at most one read-back."""
    if not tensors:
        return []
    found = native_finite(tensors)
    if found is None:
        found = [math.isfinite(row[0]) for row in read_back([max_magnitude([x]) for x in tensors])]
    return found


def native_finite(tensors: Sequence[Tensor]) -> list[bool] | None:
    """Do so natively; None if the native kernels do not serve these tensors."""
    native = native_for(tensors)
    if native is None:
        return None
    return native.finite(tensors=tensors, threads=torch.get_num_threads())


def max_magnitude(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitude in all tensors, NaN if there is one; nothing is read back.

    Returns:
        One float64 number, shape (1,).
    """
    filled = [x for x in tensors if x.numel()]
    if not filled:
        return torch.zeros(1, dtype=torch.float64)
    if filled[0].device.type == "cpu":  # where a norm would make a copy
        extremes = [torch.stack(x.aminmax()).abs().amax() for x in filled]
    else:
        extremes = list(torch._foreach_norm(filled, torch.inf))
    return torch.stack([x.double() for x in extremes]).amax().reshape(1)
