"""Recording the matrix products of a forward pass that read a weight, however it is called.

Products are recorded below the modules, where linear layers, convolutions, fused attention and
functional calls all look the same: an operator with the weight, or a view of it, as an operand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spartan.budgets.flops import MATMULS
from spartan.weights.prunable import Prunable

_CHUNK = 1 << 24  # entries of X that are gathered at a time: 64 MiB of float32


# Operators that look at a tensor, and give nothing of its values to what is computed.
_ASKS = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"),
    *("equal", "isnan", "isinf"),
}


def _name(func: Any) -> str:
    name: str = func.name()
    return name.removeprefix("aten::").partition(".")[0]


@contextmanager
def without_fused_attention() -> Iterator[None]:
    """Let attention and encoder layers compute in single products, which fused ones hide."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass(frozen=True)
class WeightProduct:
    """One product Y = W X of a weight, as a matrix, with inputs at a number of positions.

    Attributes:
        index: Of the weight.
        outputs: First and last + 1 of the weight's outputs that are computed.
        groups: Of a grouped convolution: each has its own inputs and its share of the outputs.
        positions: Columns of X: samples, tokens, pixels.
        inputs: What X is made of.
        gather: Returns the columns of X at some positions, (groups, inputs, positions).
    """

    index: int
    outputs: tuple[int, int]
    groups: int
    positions: int
    inputs: Tensor
    gather: Callable[[Tensor], Tensor]

    def columns(self, positions: Tensor) -> Iterator[Tensor]:
        """Yield X at some positions, (groups, inputs, a part of the positions), in float32."""
        if not len(positions):
            return
        inputs = self.gather(positions[:1]).numel()
        for part in positions.split(max(1, _CHUNK // inputs)):
            columns = self.gather(part)
            yield columns if columns.dtype == torch.float64 else columns.float()


class ProductRecorder(TorchDispatchMode):
    """Calls `on_product` before each product that reads one of the weights.

    Attributes:
        other_uses: Of weights by index, the operators that read them in another way: transposed, as
            a table to look up in, entry by entry.

    Args:
        weights: Those to look for.
        on_product: What to do with a product.
    """

    def __init__(
        self, weights: Sequence[Prunable], on_product: Callable[[WeightProduct], None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = weights
        self.on_product = on_product
        self.other_uses: dict[int, set[str]] = {}
        self.by_storage: dict[int, list[int]] = {}
        for i, weight in enumerate(weights):
            storage = weight.parameter.untyped_storage().data_ptr()
            self.by_storage.setdefault(storage, []).append(i)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        product = None
        if func in MATMULS:
            left, right = (args[i] for i in MATMULS[func])
            product = self._matmul(right, left, -1) or self._matmul(left, right, -2)
        elif func is torch.ops.aten.convolution.default:
            product = self._convolution(*args)
        if product is not None:
            self.on_product(product)
        elif not func.is_view and _name(func) not in _ASKS:
            self._note_other_use(func, (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _note_other_use(self, func: Any, arguments: Any) -> None:
        for value in tree_leaves(arguments):
            index = self._find(value) if isinstance(value, Tensor) else None
            if index is not None:
                self.other_uses.setdefault(index, set()).add(_name(func))

    def _find(self, operand: Tensor) -> int | None:
        """Return the weight that an operand is, or is a view of."""
        for i in self.by_storage.get(operand.untyped_storage().data_ptr(), ()):
            parameter = self.weights[i].parameter
            offset = operand.storage_offset() - parameter.storage_offset()
            if 0 <= offset < parameter.numel():
                return i
        return None

    def _matmul(self, factor: Tensor, other: Tensor, along: int) -> WeightProduct | None:
        """Return the product of a weight with `other`, if `factor` is a weight as it is used.

        Args:
            factor: One operand.
            other: The other one.
            along: Dimension of the factor that are its outputs: the last of a right factor.
        """
        index = self._find(factor)
        if index is None:
            return None
        if factor.dim() == 3:
            if factor.stride(0) != 0 and factor.shape[0] != 1:
                return None  # a matrix for each sample is not one layer
            factor = factor[0]
            other = other.transpose(0, 1).flatten(1) if along == -2 else other.flatten(0, 1)
        weight = self.weights[index]
        parameter = weight.parameter
        if parameter.dim() != 2:
            return None
        rows, cols = (1, 0) if weight.input_first else (0, 1)
        strides = parameter.stride(rows), parameter.stride(cols)
        if along == -1:
            factor = factor.t()
        if factor.stride() != strides or factor.shape[1] != parameter.shape[cols]:
            return None  # transposed, or a part of the inputs
        first = (factor.storage_offset() - parameter.storage_offset()) // strides[0]
        if other.dim() == 1:
            other = other[:, None]
        x = other if along == -2 else other.t()
        outputs = first, first + factor.shape[0]
        return WeightProduct(index, outputs, 1, x.shape[1], x, lambda p: x[:, p][None])

    def _convolution(
        self,
        x: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
    ) -> WeightProduct | None:
        index = self._find(kernel)
        if index is None or kernel.shape != self.weights[index].shape:
            return None
        if transposed != self.weights[index].input_first:
            return None
        size = list(kernel.shape[2:])
        if transposed:
            # The same as a convolution of the inputs with zeros between them, the kernel flipped.
            stuffed = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
            wide = x.new_zeros(*x.shape[:2], *stuffed)
            places: Any = (..., *(slice(None, None, s) for s in stride))
            wide[places] = x
            x = wide
            before = [d * (k - 1) - p for d, k, p in zip(dilation, size, padding, strict=True)]
            after = [b + o for b, o in zip(before, output_padding, strict=True)]
            stride = [1] * len(size)
        else:
            before = after = list(padding)
        sides = [side for b, a in zip(before[::-1], after[::-1], strict=True) for side in (b, a)]
        x = F.pad(x, sides)
        shape = [
            (n - d * (k - 1) - 1) // s + 1
            for n, d, k, s in zip(x.shape[2:], dilation, size, stride, strict=True)
        ]
        patches = _Patches(x, groups, size, stride, dilation, shape, flipped=transposed)
        outputs = self.weights[index].oriented_shape[0]
        count = x.shape[0] * math.prod(shape)
        return WeightProduct(index, (0, outputs), groups, count, x, patches)


@dataclass(frozen=True)
class _Patches:
    """Gathers what a convolution multiplies its kernel with.

    Attributes:
        x: Padded inputs (batch, channels, …).
        groups: Of the channels.
        kernel: Its size.
        stride: Of the convolution.
        dilation: Of the kernel.
        shape: Of the outputs.
        flipped: Whether the kernel is applied backwards.
    """

    x: Tensor
    groups: int
    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    shape: list[int]
    flipped: bool

    def __call__(self, positions: Tensor) -> Tensor:
        sample, *corner = torch.unravel_index(positions, (self.x.shape[0], *self.shape))
        channels_last = self.x.movedim(1, -1)
        taps = []
        for tap in torch.cartesian_prod(*(torch.arange(k) for k in self.kernel)).reshape(
            -1, len(self.kernel)
        ):
            offsets = [k - 1 - int(o) if self.flipped else int(o)
                       for o, k in zip(tap, self.kernel, strict=True)]  # fmt: skip
            place = [
                c * s + o * d
                for c, s, o, d in zip(corner, self.stride, offsets, self.dilation, strict=True)
            ]
            taps.append(channels_last[(sample, *place)])
        patches = torch.stack(taps)  # (kernel, positions, channels)
        patches = patches.reshape(*patches.shape[:2], self.groups, -1).permute(2, 0, 3, 1)
        return patches.flatten(1, 2)
