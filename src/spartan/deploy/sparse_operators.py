"""`torch.ops.spartan`: sparse layers as operators that torch.export, torch.compile and traces keep.

Compiled and exported programs cannot hold a Python layer. They hold its tensors and call these
operators, which find the prepared weights again by the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch.utils.weak import WeakTensorKeyDictionary

from spartan.checksums import bytes_of
from spartan.kernels.blocked_weights import Geometry
from spartan.kernels.products import Product
from spartan.kernels.row_bundles import RowBundles

# By the tensor of values: the others, the versions of all, what the bias held, and the product.
_products: Any = WeakTensorKeyDictionary()


@library.custom_op("spartan::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    outputs: int,
) -> Tensor:
    """Return x Wᵀ + b.

    Args:
        x: (…, inputs).
        values: (entries, height): see `kernels.row_bundles`.
        columns: int32, (entries,).
        starts: int32, (bundles + 1,).
        bias: (outputs,), or None.
        outputs: How many.
    """
    lead, inputs = x.shape[:-1], x.shape[-1]
    product = _product(values, columns, starts, bias, outputs, inputs)
    return product.linear(x.reshape(-1, inputs)).reshape(*lead, outputs)


@sparse_linear.register_fake
def _(
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None, outputs: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@library.custom_op("spartan::sparse_conv2d", mutates_args=())
def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    outputs: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the convolution of images; contiguous.

    Args:
        x: (images, channels, rows, columns).
        values: As for `sparse_linear`; columns are (channel, kernel row, kernel column).
        columns: As for `sparse_linear`.
        starts: As for `sparse_linear`.
        bias: As for `sparse_linear`.
        outputs: How many channels.
        kernel: Rows and columns; so are the others.
        stride: As `nn.Conv2d`.
        padding: Zeros on each side.
        dilation: As `nn.Conv2d`.
    """
    images, channels, rows, width = x.shape
    inputs = channels * kernel[0] * kernel[1]
    product = _product(values, columns, starts, bias, outputs, inputs)
    settings = [(a, b) for a, b in (kernel, stride, padding, dilation)]
    sizes: Any = (channels, rows, images, width, *settings, torch.get_num_threads())
    geometry = Geometry(*sizes)
    return product.convolution(x, geometry).contiguous()


@sparse_conv2d.register_fake
def _(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    outputs: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    return x.new_empty((x.shape[0], outputs, *sizes))


def _product(
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    outputs: int,
    inputs: int,
) -> Product:
    # Not the values themselves, which the table must not keep alive.
    others = (columns, starts, bias)
    versions = [version_of(t) for t in (values, *others)]
    held = b"" if bias is None or bias.device.type != "cpu" else bytes(bytes_of(bias))
    known = _products.get(values)
    if known is not None and known[1:3] == (versions, held):
        same = all(a is b or _one_memory(a, b) for a, b in zip(known[0], others, strict=True))
        if same:
            product: Product = known[3]
            return product
    product = Product(RowBundles(values.detach(), columns, starts, outputs, inputs), bias)
    _products[values] = others, versions, held, product
    return product


def _one_memory(a: Tensor | None, b: Tensor | None) -> bool:
    both = a is not None and b is not None
    return both and a.data_ptr() == b.data_ptr() and a.shape == b.shape  # type: ignore[union-attr]


def version_of(tensor: Tensor | None) -> int:
    """Return a number that changes when a tensor is written; 0 where torch counts no writes."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version
