"""`Product`: sparse weights times dense activations, for inference (linear, convolution)."""

from __future__ import annotations

import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spartan.checksums import bytes_of
from spartan.errors import KernelError
from spartan.kernels.blocked_weights import (
    BlockedWeights,
    Geometry,
    block_for_images,
    block_for_samples,
    lanes_for,
    slice_rows,
)
from spartan.kernels.dispatch import Native, native_for_any_order
from spartan.kernels.row_bundles import RowBundles

if TYPE_CHECKING:
    from spartan.kernels._native import Kernels as NativeKernels

ACTIVATIONS = ("none", "relu", "gelu")
# Above this many samples, lanes beat reading all weights once for each.
_FEW = 2
# Sizes of inputs that weights stay blocked for, those a server meets in turn; the oldest goes
# first. Fewer where they would take more memory than the dense weight did.
_PREPARED_KEPT = 16

_T = TypeVar("_T")


class Product:
    """W x + b, then an addend and an activation, for a sparse W.

    The weights are blocked anew for each size of input, and the last blockings are kept. Any number
    of threads may call at a time.

    Args:
        weights: W, on the CPU; columns of a convolution are (channel, kernel row, kernel column).
        bias: float32, (outputs,), or None.

    Raises:
        KernelError: The weights contradict themselves.
    """

    def __init__(self, weights: RowBundles, bias: Tensor | None) -> None:
        _check(weights)
        self.weights = weights
        self._checksum = _checksum(weights)
        self.bias = bias
        self._prepared: OrderedDict[Any, Any] = OrderedDict()
        blocked_bytes = weights.values.numel() * 4 + weights.columns.numel() * 2
        most = weights.outputs * weights.inputs * 4 // max(1, blocked_bytes)
        self._kept = max(2, min(_PREPARED_KEPT, most))
        self._padded_bias = torch.zeros(weights.count * weights.height)
        if bias is not None:
            self._padded_bias[: weights.outputs] = bias

    def linear(
        self,
        x: Tensor,
        addend: Tensor | None = None,
        activation: str = "none",
        feature_major: bool = False,
    ) -> Tensor:
        """Apply to samples.

        Args:
            x: float32, (samples, inputs); fastest if either of its strides is 1.
            addend: (samples, outputs), or None.
            activation: `"none"`, `"relu"` or `"gelu"` (exact).
            feature_major: Return memory order (outputs, samples).

        Returns:
            (samples, outputs).
        """
        samples, w = x.shape[0], self.weights
        addressable = samples > 0 and w.inputs <= 1 << 16
        native = _native_for(x, w.values, addend) if addressable else None
        if native is None:
            return self._linear_by_torch(x, addend, activation)
        if samples <= _FEW:
            return self._few(native, x.contiguous(), addend, activation)
        if 1 not in x.stride():
            x = x.contiguous()
        if feature_major:
            y = torch.empty(w.outputs, samples).t()
        else:
            y = torch.empty(samples, w.outputs)
        addend = _in_order_of(y, addend)
        lanes = lanes_for(samples, w.height)
        blocked = self._prepare(
            ("linear", lanes), lambda: self._blocked(native, block_for_samples(w, samples))
        )
        native.linear(
            weights=blocked.weights,
            x=x,
            y=y,
            addend=addend,
            inputs=w.inputs,
            feature_major=feature_major,
            lanes=blocked.lanes,
            activation=ACTIVATIONS.index(activation),
            threads=torch.get_num_threads(),
        )
        return y

    def _few(self, native: Native, x: Tensor, addend: Tensor | None, activation: str) -> Tensor:
        weights = self._prepare("slices", lambda: self._sliced(native))
        y = torch.empty(len(x), self.weights.outputs)
        addend = None if addend is None else addend.contiguous()
        for i in range(len(x)):
            native.vector(
                weights=weights,
                x=x[i],
                y=y[i],
                addend=None if addend is None else addend[i],
                activation=ACTIVATIONS.index(activation),
                threads=torch.get_num_threads(),
            )
        return y

    def convolution(
        self,
        x: Tensor,
        geometry: Geometry,
        addend: Tensor | None = None,
        activation: str = "none",
    ) -> Tensor:
        """Apply to images.

        Args:
            x: float32, (images, channels, rows, columns).
            geometry: Sizes and strides, for this x.
            addend: Shaped like the output, or None.
            activation: `"none"`, `"relu"` or `"gelu"` (exact).

        Returns:
            (images, outputs, rows, columns); where rows are short, in the memory order (outputs,
            rows, images, columns), in which the rows of several images fill vectors together.
        """
        w, g = self.weights, geometry
        if not g.images:
            return x.new_empty(0, w.outputs, g.out_rows, g.out_columns)
        native = _native_for(x, w.values, addend) if x.numel() and g.height else None
        if native is None:
            return self._convolution_by_torch(x, g, addend, activation)
        if g.group > 1:
            if x.stride(3) != 1 or x.stride(0) != g.columns:
                x = x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
            y = torch.empty(w.outputs, g.out_rows, g.images, g.out_columns).permute(2, 0, 1, 3)
        else:
            if x.stride(3) != 1:
                x = x.contiguous()
            y = torch.empty(g.images, w.outputs, g.out_rows, g.out_columns)
        addend = _in_order_of(y, addend)
        blocked, sizes = self._prepare(
            g, lambda: (self._blocked(native, block_for_images(w, g)), _native_sizes(native, g))
        )
        native.convolution(
            weights=blocked.weights,
            sizes=sizes,
            x=x,
            y=y,
            addend=addend,
            lanes=blocked.lanes,
            activation=ACTIVATIONS.index(activation),
            threads=torch.get_num_threads(),
        )
        return y

    def _blocked(self, native: Native, blocked: BlockedWeights) -> _Blocked:
        weights = native.BlockedWeights(
            values=blocked.values,
            offsets=blocked.offsets,
            starts=blocked.starts,
            bases=blocked.bases,
            bias=self._padded_bias,
            bundles=self.weights.count,
            outputs=self.weights.outputs,
            height=self.weights.height,
        )
        return _Blocked(weights, blocked.lanes)

    def _sliced(self, native: Native) -> NativeKernels.SlicedWeights:
        s = slice_rows(self.weights)
        return native.SlicedWeights(
            values=s.values,
            columns=s.columns,
            starts=s.starts,
            rows=s.rows,
            bias=self._padded_bias,
            inputs=self.weights.inputs,
            outputs=self.weights.outputs,
        )

    def _prepare(self, key: Any, make: Callable[[], _T]) -> _T:
        found: _T | None = self._prepared.get(key)
        if found is None:
            if _checksum(self.weights) != self._checksum:
                raise KernelError(
                    "The columns or starts of a sparse layer have been written into, past torch's "
                    "notice (through .data or NumPy). Accelerate the model again."
                )
            with torch.inference_mode(False):
                found = make()
            self._prepared[key] = found
            while len(self._prepared) > self._kept:
                self._prepared.popitem(last=False)
        return found

    def _linear_by_torch(self, x: Tensor, addend: Tensor | None, activation: str) -> Tensor:
        return self._finish(self._multiply(x.t()).t(), addend, activation, (-1,))

    def _convolution_by_torch(
        self, x: Tensor, g: Geometry, addend: Tensor | None, activation: str
    ) -> Tensor:
        patches = F.unfold(x, g.kernel, g.dilation, g.padding, g.stride)
        images, inputs, positions = patches.shape
        y = self._multiply(patches.transpose(0, 1).reshape(inputs, -1))
        y = y.view(-1, images, positions).transpose(0, 1)
        y = y.reshape(images, -1, g.out_rows, g.out_columns)
        return self._finish(y, addend, activation, (-1, 1, 1))

    def _multiply(self, x: Tensor) -> Tensor:
        """Return W x by torch, for any dtype and device."""

        def make() -> Tensor:
            dense = self.weights.dense().to(x)
            if x.dtype not in (torch.float32, torch.float64):
                return dense  # has no sparse product
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR", UserWarning)
                return dense.to_sparse_csr()

        w = self._prepare(("torch", x.device, x.dtype), make)
        # Autocast would narrow a sparse product, which exists for wide floats only.
        with torch.autocast(x.device.type, enabled=False):
            return w @ x if w.layout is torch.strided else torch.sparse.mm(w, x)

    def _finish(
        self, y: Tensor, addend: Tensor | None, activation: str, bias_shape: tuple[int, ...]
    ) -> Tensor:
        if self.bias is not None:
            y = y + self.bias.to(y).view(bias_shape)
        return activate(y if addend is None else y + addend, activation)


def activate(y: Tensor, activation: str) -> Tensor:
    """Apply one of `ACTIVATIONS`."""
    if activation == "none":
        return y
    return F.relu(y) if activation == "relu" else F.gelu(y)


def _native_for(x: Tensor, values: Tensor, addend: Tensor | None) -> Native | None:
    return native_for_any_order(x, values, *(() if addend is None else (addend,)))


@dataclass(frozen=True)
class _Blocked:
    """Blocked weights as the native kernels hold them, and the lanes to compute at a time."""

    weights: NativeKernels.BlockedWeights
    lanes: int


def _native_sizes(native: Native, g: Geometry) -> NativeKernels.Convolution:
    return native.Convolution(
        channels=g.channels,
        rows=g.rows,
        images=g.images,
        columns=g.columns,
        out=(g.out_rows, g.out_columns),
        kernel=g.kernel,
        stride=g.stride,
        padding=g.padding,
        dilation=g.dilation,
        group=g.group,
        height=g.height,
    )


def _checksum(w: RowBundles) -> int:
    """Return a number that is another when an index is another."""
    return zlib.crc32(bytes_of(w.columns), zlib.crc32(bytes_of(w.starts)))


def _check(w: RowBundles) -> None:
    """Refuse weights that would make native code read what is not theirs."""
    entries = w.columns.numel()
    starts = w.starts.long()
    sound = (
        w.values.shape == (entries, w.height)
        and w.count == -(-w.outputs // w.height)
        and int(starts[0]) == 0
        and int(starts[-1]) == entries
        and bool((starts.diff() >= 0).all())
        and (not entries or 0 <= int(w.columns.min()) <= int(w.columns.max()) < w.inputs)
    )
    if not sound:
        raise KernelError(
            f"These are not the weights of {w.inputs} inputs and {w.outputs} outputs: columns or "
            "row starts are out of range."
        )


def _in_order_of(y: Tensor, addend: Tensor | None) -> Tensor | None:
    """Return the addend in y's memory order."""
    if addend is None or addend.stride() == y.stride():
        return addend
    return torch.empty_strided(y.shape, y.stride()).copy_(addend)
