"""FLOPs per forward pass of each prunable weight, traced on an example input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spartan.errors import BudgetError
from spartan.example_inputs import run_on
from spartan.weights.prunable import Prunable

# Products of two matrices, and the places of their factors.
MATMULS = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.bmm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.baddbmm.default: (1, 2),
    torch.ops.aten.mv.default: (0, 1),
    torch.ops.aten.addmv.default: (1, 2),
}


def trace_flops(model: nn.Module, weights: Sequence[Prunable], example_input: Any) -> list[float]:
    """Return the FLOPs (2 per multiply-add) that one entry of each weight costs per forward pass.

    The model runs once in evaluation mode on `example_input`; every matrix product and convolution
    that reads a weight is charged to it, however the module calls it (fused attention, reuse in
    several places, functional calls). Its training flags and buffers are left as they were.

    Args:
        model: The module.
        weights: The weights to charge.
        example_input: One batch: a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        BudgetError: A weight is not reached by the example input.
    """
    # Views of a parameter (transposes, slices of a fused projection) share its storage.
    counter = _FlopCounter({w.parameter.untyped_storage().data_ptr() for w in weights})
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # With gradients on, attention layers do not take their opaque fused inference path.
        with torch.enable_grad(), counter:
            run_on(model, example_input)
    finally:
        for module, flag in training.items():
            module.training = flag

    flops = [
        counter.flops.get(w.parameter.untyped_storage().data_ptr(), 0) / w.parameter.numel()
        for w in weights
    ]
    missed = [w.name for w, cost in zip(weights, flops, strict=True) if cost == 0]
    if missed:
        raise BudgetError(
            f"The example input does not reach {', '.join(map(repr, missed))}, so their FLOPs are "
            "unknown: exclude them, or give an example input that runs them."
        )
    return flops


class _FlopCounter(TorchDispatchMode):
    """Charges each matrix product or convolution to the parameter whose storage it reads."""

    def __init__(self, storages: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = storages
        self.flops: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in MATMULS:
            left, right = (args[i] for i in MATMULS[func])
            self._charge(left, 2 * out.numel() * left.shape[-1])
            self._charge(right, 2 * out.numel() * left.shape[-1])
        elif func is torch.ops.aten.convolution.default:
            x, weight, transposed = args[0], args[1], args[6]
            positions = x if transposed else out
            per_position = math.prod(weight.shape) // weight.shape[0]
            self._charge(weight, 2 * positions.numel() * per_position)
        return out

    def _charge(self, tensor: Tensor, flops: int) -> None:
        storage = tensor.untyped_storage().data_ptr()
        if storage in self.storages:
            self.flops[storage] = self.flops.get(storage, 0) + flops
