"""Whether tensors hold NaN or infinity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spartan.kernels.dispatch import native_for


def finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Say of each tensor whether all entries are finite, with at most one read-back."""
    if not tensors:
        return []
    found = native_finite(tensors)
    if found is None:
        found = torch.isfinite(largest(tensors)).tolist()
    return found


def native_finite(tensors: Sequence[Tensor]) -> list[bool] | None:
    """Do so natively; None if the native kernels do not serve these tensors."""
    native = native_for(tensors)
    if native is None:
        return None
    found: list[bool] = native.finite(
        [x.data_ptr() for x in tensors], [x.numel() for x in tensors], torch.get_num_threads()
    )
    return found


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitude of each tensor, NaN if it holds one; nothing is read back."""
    if tensors[0].device.type == "cpu":  # where a norm would make a copy
        return torch.stack([torch.stack(x.aminmax()).abs().amax().double() for x in tensors])
    norms = torch._foreach_norm(list(tensors), torch.inf)
    return torch.stack([x.double() for x in norms])
