"""`InferenceLinear`, `InferenceConv1D` and `InferenceConv2d`: layers with sparse weights."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spartan.deploy.inference_base import InferenceLayer
from spartan.deploy.sparse_operators import sparse_conv2d, sparse_linear
from spartan.errors import DeployError
from spartan.kernels.blocked_weights import Geometry
from spartan.kernels.products import activate

__all__ = ["InferenceConv1D", "InferenceConv2d", "InferenceLayer", "InferenceLinear"]

_GEOMETRIES_KEPT = 16  # sizes of inputs: those a server meets in turn


class InferenceLinear(InferenceLayer, nn.Linear):  # type: ignore[misc, override]
    """`nn.Linear` with a sparse weight, for inference.

    Args:
        linear: The layer to take over.
        height: Rows that share their columns; by default as its zeros suggest.
    """

    def __init__(self, linear: nn.Linear, height: int | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.hold(linear.weight, linear.bias, height)
        self.train(linear.training)

    def forward(
        self,
        input: Tensor,
        addend: Tensor | None = None,
        activation: str = "none",
        norm: Any = None,
        feature_major: bool = False,
    ) -> Tensor:
        """Apply to the last dimension.

        Args:
            input: (…, inputs).
            addend: (…, outputs), added before the activation.
            activation: `"none"`, `"relu"` or `"gelu"`.
            norm: A batch norm in evaluation, before the addend.
            feature_major: Whether the result is stored outputs first.
        """
        x, activation = input, self.activation if activation == "none" else activation
        if _in_a_program():
            self.refuse_unrecorded()
            self.refuse_training(x)
            return self._in_program(x)
        if self._lent is not None:
            self.take_back()
        if self.is_dense:
            return _finish(self._dense_linear(x), norm, addend, activation)
        self.refuse_training(x, addend)
        if x.shape[-1:] != (self.inputs,):
            raise DeployError(
                f"This layer has {self.inputs} inputs; it was given a tensor of {tuple(x.shape)}."
            )
        product, lead = self.product(norm), x.shape[:-1]
        if addend is not None and not _fits(addend, x, (*lead, self.outputs)):
            return _finish(_unflatten(product.linear(_samples(x)), lead), None, addend, activation)
        flat_addend = None if addend is None else _samples(addend)
        return _unflatten(product.linear(_samples(x), flat_addend, activation, feature_major), lead)

    def _dense_linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def _in_program(self, x: Tensor) -> Tensor:
        if self.is_dense:
            return self._dense_linear(x)
        parts = (self.values, self.columns, self.starts, self.bias)
        return cast("Tensor", sparse_linear(x, *parts, self.outputs))


class InferenceConv1D(InferenceLinear):
    """`Conv1D` of transformers, which stores its weight as (inputs, outputs), for inference.

    Args:
        layer: The layer to take over.
        height: Outputs that share their inputs; by default as its zeros suggest.
    """

    def __init__(self, layer: Any, height: int | None = None) -> None:
        nn.Module.__init__(self)
        self.nx, self.nf = self.in_features, self.out_features = layer.weight.shape
        self.hold(layer.weight.detach().t(), layer.bias, height)
        self._weight_shape = (self.nx, self.nf)
        self.train(layer.training)

    def _dense(self) -> Tensor:
        return self.matrix().t().contiguous()

    def _dense_linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class InferenceConv2d(InferenceLayer, nn.Conv2d):  # type: ignore[misc, override]
    """`nn.Conv2d` without groups, zero-padded, with a sparse weight, for inference.

    Args:
        conv: The layer to take over.
        height: Filters that share their columns; by default as their zeros suggest.
    """

    def __init__(self, conv: nn.Conv2d, height: int | None = None) -> None:
        nn.Module.__init__(self)
        for name in (*_SETTINGS, "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(conv, name))
        self.hold(conv.weight, conv.bias, height)
        self.zeros = _padding(conv)
        self._geometries: dict[tuple[tuple[int, ...], int], Geometry] = {}
        self.train(conv.training)

    def geometry(self, shape: tuple[int, ...], threads: int) -> Geometry:
        """Return sizes and strides for inputs of (images, channels, rows, columns).

        Raises:
            DeployError: This is no input of the layer.
        """
        known = self._geometries.get((shape, threads))
        if known is not None:
            return known
        if len(shape) != 4 or shape[1] != self.in_channels:
            raise DeployError(
                f"This layer takes images of {self.in_channels} channels; it was given a tensor of "
                f"{shape}."
            )
        images, channels, rows, columns = shape
        settings = (_pair(self.kernel_size), _pair(self.stride), self.zeros, _pair(self.dilation))
        geometry = Geometry(channels, rows, images, columns, *settings, threads=threads)
        if geometry.out_rows < 1 or geometry.out_columns < 1:
            raise DeployError(f"Images of {rows}x{columns} are smaller than the kernel.")
        if len(self._geometries) >= _GEOMETRIES_KEPT:
            self._geometries = {}
        self._geometries[shape, threads] = geometry
        return geometry

    def forward(
        self,
        input: Tensor,
        addend: Tensor | None = None,
        activation: str = "none",
        norm: Any = None,
    ) -> Tensor:
        """Apply to images.

        Args:
            input: ([images,] channels, rows, columns).
            addend: Shaped like the output, added before the activation.
            activation: `"none"`, `"relu"` or `"gelu"`.
            norm: A batch norm in evaluation, before the addend.
        """
        x, activation = input, self.activation if activation == "none" else activation
        if _in_a_program():
            self.refuse_unrecorded()
            self.refuse_training(x)
            return self._in_program(x)
        if self._lent is not None:
            self.take_back()
        if self.is_dense:
            y = self._conv_forward(x, self.weight, self.bias)
            return _finish(y, norm, addend, activation)
        self.refuse_training(x, addend)
        if x.dim() == 3:
            given = None if addend is None else addend[None]
            return self.forward(x[None], given, activation, norm)[0]
        geometry = self.geometry(tuple(x.shape), torch.get_num_threads())
        product = self.product(norm)
        shape = (geometry.images, self.outputs, geometry.out_rows, geometry.out_columns)
        if addend is None or _fits(addend, x, shape):
            return product.convolution(x, geometry, addend, activation)
        return _finish(product.convolution(x, geometry), None, addend, activation)

    def _in_program(self, x: Tensor) -> Tensor:
        if self.is_dense:
            return cast("Tensor", self._conv_forward(x, self.weight, self.bias))
        if x.dim() == 3:
            return self._in_program(x[None]).squeeze(0)
        parts = (self.values, self.columns, self.starts, self.bias)
        sizes = (self.kernel_size, self.stride, self.zeros, self.dilation)
        return cast("Tensor", sparse_conv2d(x, *parts, self.outputs, *sizes))


_SETTINGS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
    *("transposed", "output_padding", "groups", "padding_mode"),
)


def why_not_replaceable(module: nn.Module) -> str:
    """Return why there is no sparse layer for a dense one; nothing if there is."""
    kind = type(module)
    if kind not in (nn.Linear, nn.Conv2d) and not _is_conv1d_of_transformers(module):
        return f"{kind.__name__}: no sparse layer of this class"
    if "forward" in vars(module):
        return "its forward was replaced"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has hooks, which a sparse layer would lose"
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype is not torch.float32 or weight.device.type != "cpu":
        return f"{weight.dtype} on {weight.device.type}".replace("torch.", "")
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return f"{module.groups} groups: no kernel for them"
        if module.padding_mode != "zeros" or _padding(module) is None:
            return "no kernel for its padding"
    return ""


def matrix_of(module: Any) -> Tensor:
    """Return the weight of a replaceable layer as (outputs, inputs)."""
    weight: Tensor = module.weight.detach()
    return weight.t() if _is_conv1d_of_transformers(module) else weight.flatten(1)


def inference_layer(module: nn.Module, height: int | None = None) -> InferenceLayer:
    """Return the sparse layer for a replaceable one."""
    if isinstance(module, nn.Linear):
        return InferenceLinear(module, height)
    if isinstance(module, nn.Conv2d):
        return InferenceConv2d(module, height)
    return InferenceConv1D(module, height)


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and {"nf", "nx"} <= vars(module).keys()


def _in_a_program() -> bool:
    """Whether torch is recording a program: compiling, exporting or tracing."""
    return torch.compiler.is_compiling() or _tracing_state() is not None


_tracing_state = torch._C._get_tracing_state


def _finish(y: Tensor, norm: Any, addend: Tensor | None, activation: str) -> Tensor:
    if norm is not None:
        y = F.batch_norm(
            y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
    return activate(y if addend is None else y + addend, activation)


def _fits(addend: Tensor, x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the addend can go into the product: shaped and stored like its result."""
    return addend.shape == shape and addend.dtype == x.dtype and addend.device == x.device


def _samples(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _unflatten(y: Tensor, lead: torch.Size) -> Tensor:
    return y if len(lead) == 1 else y.reshape(*lead, y.shape[-1])


def _pair(size: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = size
    return rows, columns


def _padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Return zeros on each side of rows and columns; None if the sides differ."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(r % 2 for r in reach) else (reach[0] // 2, reach[1] // 2)
    assert not isinstance(conv.padding, str)
    return _pair(conv.padding)
