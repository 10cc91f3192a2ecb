"""Sparse-dense products of always-sparse layers and their gradients, native or in torch.

Activations are batches of panels, (panels, features, samples of a panel), in which samples are
neighbours: one connection is a vector operation, and rows of samples that are gathered stay in the
cache. The torch versions serve other dtypes, CUDA, and machines without a compiler; they use the
sparse products of torch, and both orders of the connections, which are made when the graph changes.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from spartan.kernels.connections import Connections
from spartan.kernels.dispatch import Native, native_for_any_order
from spartan.kernels.scores import wide

# Samples of a panel: so many are processed where they are, more are divided into panels. 128 floats
# are eight vectors of AVX-512, the sums that the inner loop holds in registers (connections.inc).
_WHOLE, _PANEL = 256, 128
# Results of at least so many floats (1 MiB) are written to memory that is kept between steps; below
# malloc does the same.
_LENT = 1 << 18


def split(x: Tensor) -> list[Tensor]:
    """Cut samples into panels.

    Args:
        x: (images, features, samples of an image).

    Returns:
        Tensors (panels, features, samples) in which samples are neighbours; `x` itself if it is so.
    """
    samples = x.shape[2]
    if x.numel() == 0:
        return [x]
    if samples <= _WHOLE:
        return [x if x.stride(2) == 1 or samples <= 1 else _gathered(x)]
    full = samples // _PANEL * _PANEL
    panels = x[:, :, :full].unflatten(2, (-1, _PANEL)).transpose(1, 2)
    images = [_gathered(image) for image in panels]
    whole = images[0] if len(images) == 1 else torch.cat(images)
    return [whole] if full == samples else [whole, _gathered(x[:, :, full:])]


def _gathered(x: Tensor) -> Tensor:
    """Copy (panels, features, samples) so that samples are neighbours."""
    panels, features, samples = x.shape
    native = _native(x, x)
    if native is None or x.stride(1) != 1:
        return x.contiguous()
    gathered = _fresh(native, panels, features, samples)
    native.connections_gather_samples(x=x, out=gathered, threads=torch.get_num_threads())
    return gathered


def join(parts: list[Tensor], images: int) -> Tensor:
    """Undo `split`: return (images, features, samples)."""
    if len(parts) == 1 and parts[0].shape[0] == images:
        return parts[0]
    whole = parts[0].unflatten(0, (images, -1)).transpose(1, 2).flatten(2)
    return whole if len(parts) == 1 else torch.cat((whole, parts[1]), 2)


def multiply(connections: Connections, values: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return W x + b.

    Args:
        connections: Where W is not zero.
        values: (connections,), floating point.
        bias: (outputs,), or None.
        x: (panels, inputs, samples).

    Returns:
        (panels, outputs, samples).
    """
    values = values.contiguous()
    bias = None if bias is None else bias.contiguous()
    given = (values, x) if bias is None else (values, x, bias)
    native = _native(x, *given)
    if native is None:
        w = _matrix(connections.starts, connections.columns, values, connections.inputs)
        y = _product(w, x)
        return y if bias is None else y + bias[:, None]
    y = _fresh(native, x.shape[0], connections.outputs, x.shape[2])
    native.connections_forward(
        lines=connections.by_output.native(native, x.shape[2]),
        values=values,
        bias=bias,
        x=x,
        y=y,
        threads=torch.get_num_threads(),
    )
    return y


def gradients(
    connections: Connections, values: Tensor, x: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the input and of the values; see `multiply`.

    Args:
        connections: Where W is not zero.
        values: (connections,).
        x: (panels, inputs, samples).
        dy: (panels, outputs, samples), the gradient of W x.

    Returns:
        Tensors like `x` and `values`.
    """
    values = values.contiguous()
    native = _native(x, values, x, dy)
    if native is None:
        by_input, order = connections.by_input, connections.order
        w = _matrix(by_input.starts, by_input.others, values[order], connections.outputs)
        return _product(w, dy), at_pairs(connections, x, dy)
    dx, dvalues = _fresh(native, *x.shape), torch.empty_like(values)
    native.connections_backward(
        lines=connections.by_input.native(native, x.shape[2]),
        values=values,
        x=x,
        dy=dy,
        dx=dx,
        dvalues=dvalues,
        threads=torch.get_num_threads(),
    )
    return dx, dvalues


def at_pairs(connections: Connections, x: Tensor, dy: Tensor) -> Tensor:
    """Return the weight gradient dy xᵀ at some entries, connected or not.

    Args:
        connections: The entries.
        x: (panels, inputs, samples).
        dy: (panels, outputs, samples).

    Returns:
        (connections,).
    """
    native = _native(x, x, dy)
    if native is None:
        zeros = wide(x).new_zeros(connections.count)
        pattern = _matrix(connections.starts, connections.columns, zeros, connections.inputs)
        # Autocast would narrow a sparse product, which exists for wide floats only.
        with torch.autocast(x.device.type, enabled=False):
            product = torch.sparse.sampled_addmm(pattern, _flat(dy), _flat(x).t())
        at_entries: Tensor = product.values()
        return at_entries.to(x.dtype)
    dvalues = x.new_empty(connections.count)
    native.connections_pairs(
        lines=connections.by_output.native(native, x.shape[2]),
        dy=dy,
        x=x,
        dvalues=dvalues,
        threads=torch.get_num_threads(),
    )
    return dvalues


def _native(x: Tensor, *given: Tensor) -> Native | None:
    return native_for_any_order(*given) if x.numel() else None


def _fresh(native: Native, *shape: int) -> Tensor:
    """Return a tensor to be written, float32."""
    count = math.prod(shape)
    if count < _LENT:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    return native.lend(count).view(shape)


def _flat(x: Tensor) -> Tensor:
    """Return (features, all samples), in float32 or float64."""
    return wide(x).transpose(0, 1).flatten(1)


def _product(w: Tensor, x: Tensor) -> Tensor:
    panels, _, samples = x.shape
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = torch.sparse.mm(w, _flat(x).contiguous())
    return y.view(w.shape[0], panels, samples).transpose(0, 1).to(x.dtype)


def _matrix(starts: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse ", UserWarning)
        shape = (starts.numel() - 1, width)
        return torch.sparse_csr_tensor(
            starts, columns, wide(values), shape, device=values.device, check_invariants=False
        )
