"""`InferenceLinear` and `InferenceConv2d`: layers with sparse weights, for inference only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spartan.errors import DeployError
from spartan.kernels.blocked_weights import Geometry
from spartan.kernels.products import Product, activate
from spartan.kernels.row_bundles import RowBundles, bundle

_GEOMETRIES_KEPT = 16  # sizes of inputs: those a server meets in turn


class InferenceLayer(nn.Module):
    """What sparse layers have in common: the weights, as buffers, and what follows the product.

    Attributes:
        values: float32, (entries, height): see `kernels.row_bundles`.
        columns: int32, (entries,).
        starts: int32, (bundles + 1,).
        bias: float32, (outputs,), or None.
        activation: `"none"`, `"relu"` or `"gelu"`, applied after the product and the addend.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    bias: Tensor | None

    def __init__(self, matrix: Tensor, bias: Tensor | None, height: int | None) -> None:
        super().__init__()
        self.outputs, self.inputs = matrix.shape
        self.activation = "none"
        with torch.inference_mode(False), torch.no_grad():
            weights = bundle(matrix.detach().cpu().float().contiguous(), height)
            own_bias = None if bias is None else bias.detach().cpu().float().clone()
        self.register_buffer("values", weights.values)
        self.register_buffer("columns", weights.columns)
        self.register_buffer("starts", weights.starts)
        self.register_buffer("bias", own_bias)
        self._product: Product | None = None

    def product(self) -> Product:
        """Return W x + b; the buffers are read when it is made, after each load or move."""
        product = self._product
        if product is None:
            w = RowBundles(self.values, self.columns, self.starts, self.outputs, self.inputs)
            self._product = product = Product(w, self.bias)
        return product

    @property
    def density(self) -> float:
        """Stored share of the weights."""
        return self.values.numel() / max(1, self.outputs * self.inputs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._product = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._product = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_product": None}  # made again when first used

    def _refuse_training_and_tracing(self, x: Tensor, addend: Tensor | None) -> None:
        wanted = x.requires_grad or (addend is not None and addend.requires_grad)
        if wanted and torch.is_grad_enabled():
            raise DeployError(
                "This layer was accelerated for inference and has no gradient: run it under "
                "torch.no_grad() or torch.inference_mode(), and train the original model."
            )
        if torch._C._get_tracing_state() is not None:
            raise DeployError(
                "torch.jit.trace cannot see the sparse kernels: trace the original model."
            )

    def extra_repr(self) -> str:
        fused = "" if self.activation == "none" else f", activation={self.activation}"
        return (
            f"{self.inputs}, {self.outputs}, density={self.density:.4f}, "
            f"rows={self.values.shape[1]}, bias={self.bias is not None}{fused}"
        )


class InferenceLinear(InferenceLayer):
    """`nn.Linear` with a sparse weight, for inference.

    Args:
        linear: The layer to take over.
        height: Rows that share their columns; by default as its zeros suggest.
    """

    def __init__(self, linear: nn.Linear, height: int | None = None) -> None:
        super().__init__(linear.weight, linear.bias, height)
        self.feature_major = False

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Apply to the last dimension.

        Args:
            x: (…, inputs).
            addend: (…, outputs), added before the activation.
        """
        self._refuse_training_and_tracing(x, addend)
        if x.shape[-1:] != (self.inputs,):
            raise DeployError(
                f"This layer has {self.inputs} inputs; it was given a tensor of {tuple(x.shape)}."
            )
        lead = x.shape[:-1]
        if addend is not None and not _fits(addend, x, (*lead, self.outputs)):
            return activate(self._product_of(x, None, "none") + addend, self.activation)
        return self._product_of(x, addend, self.activation)

    def _product_of(self, x: Tensor, addend: Tensor | None, activation: str) -> Tensor:
        lead = x.shape[:-1]
        flat_addend = None if addend is None else _samples(addend)
        y = self.product().linear(_samples(x), flat_addend, activation, self.feature_major)
        return y if len(lead) == 1 else y.unflatten(0, lead) if lead else y[0]


class InferenceConv2d(InferenceLayer):
    """`nn.Conv2d` without groups, zero-padded, with a sparse weight, for inference.

    Args:
        conv: The layer to take over.
        height: Filters that share their columns; by default as their zeros suggest.
    """

    def __init__(self, conv: nn.Conv2d, height: int | None = None) -> None:
        super().__init__(conv.weight.detach().flatten(1), conv.bias, height)
        self.channels = conv.in_channels
        self.kernel = _pair(conv.kernel_size)
        self.stride = _pair(conv.stride)
        self.dilation = _pair(conv.dilation)
        self.padding = _padding(conv)
        self._geometries: dict[tuple[tuple[int, ...], int], Geometry] = {}

    def geometry(self, shape: tuple[int, ...], threads: int) -> Geometry:
        """Return sizes and strides for inputs of (images, channels, rows, columns).

        Raises:
            DeployError: This is no input of the layer.
        """
        known = self._geometries.get((shape, threads))
        if known is not None:
            return known
        if len(shape) != 4 or shape[1] != self.channels:
            raise DeployError(
                f"This layer takes images of {self.channels} channels; it was given a tensor of "
                f"{shape}."
            )
        images, channels, rows, columns = shape
        settings = (self.kernel, self.stride, self.padding, self.dilation)
        geometry = Geometry(channels, rows, images, columns, *settings, threads=threads)
        if geometry.out_rows < 1 or geometry.out_columns < 1:
            raise DeployError(f"Images of {rows}x{columns} are smaller than the kernel.")
        if len(self._geometries) >= _GEOMETRIES_KEPT:
            self._geometries = {}
        self._geometries[shape, threads] = geometry
        return geometry

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Apply to images.

        Args:
            x: ([images,] channels, rows, columns).
            addend: Shaped like the output, added before the activation.
        """
        self._refuse_training_and_tracing(x, addend)
        if x.dim() == 3:
            batch: Tensor = self.forward(x[None], None if addend is None else addend[None])
            return batch[0]
        geometry = self.geometry(tuple(x.shape), torch.get_num_threads())
        product = self.product()
        shape = (geometry.images, self.outputs, geometry.out_rows, geometry.out_columns)
        if addend is not None and not _fits(addend, x, shape):
            return activate(product.convolution(x, geometry) + addend, self.activation)
        return product.convolution(x, geometry, addend, self.activation)


def replaceable(module: nn.Module) -> bool:
    """Whether there is a sparse layer for this one."""
    if type(module) is nn.Linear:
        return module.weight.layout is torch.strided and module.weight.is_floating_point()
    return (
        type(module) is nn.Conv2d
        and module.groups == 1
        and module.padding_mode == "zeros"
        and _padding(module) is not None
    )


def inference_layer(module: nn.Module, height: int | None = None) -> InferenceLayer:
    """Return the sparse layer for a replaceable one."""
    if isinstance(module, nn.Linear):
        return InferenceLinear(module, height)
    assert isinstance(module, nn.Conv2d)
    return InferenceConv2d(module, height)


def _fits(addend: Tensor, x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the addend can go into the product: shaped and stored like its result."""
    return addend.shape == shape and addend.dtype == x.dtype and addend.device == x.device


def _samples(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _pair(size: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = size
    return rows, columns


def _padding(conv: nn.Conv2d) -> Any:
    """Return zeros on each side of rows and columns; None if the sides differ."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return None if any(r % 2 for r in reach) else (reach[0] // 2, reach[1] // 2)
    assert not isinstance(conv.padding, str)
    return _pair(conv.padding)
