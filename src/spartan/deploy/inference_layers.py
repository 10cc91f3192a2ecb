"""`InferenceLinear` and `InferenceConv2d`: layers with sparse weights, for inference only.

To the code around it a sparse layer is the dense layer it came from: a subclass, with its sizes,
its bias, and a `weight` that is made dense when its values are read. Who writes into that weight,
or assigns another, gets a dense layer from then on.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spartan.deploy.sparse_operators import sparse_conv2d, sparse_linear, version_of
from spartan.deploy.weight_on_demand import WeightOnDemand
from spartan.errors import DeployError
from spartan.kernels.blocked_weights import Geometry
from spartan.kernels.products import Product, activate
from spartan.kernels.row_bundles import RowBundles, bundle

_GEOMETRIES_KEPT = 16  # sizes of inputs: those a server meets in turn


class Norm(NamedTuple):
    """A batch norm in evaluation, which a layer applies to its outputs.

    Attributes:
        weight: (outputs,), or None.
        bias: (outputs,), or None.
        mean: (outputs,).
        variance: (outputs,).
        eps: Added to the variance.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    variance: Tensor
    eps: float

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return a and c of y ↦ a y + c, float64."""
        scale = (self.variance.double() + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight.double()
        shift = -self.mean.double() * scale
        return scale, shift if self.bias is None else shift + self.bias.double()


class _Made(NamedTuple):
    """A product, and what it was made from."""

    tensors: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    product: Product

    def holds(self, tensors: tuple[Tensor | None, ...]) -> bool:
        same = all(a is b for a, b in zip(tensors, self.tensors, strict=True))
        return same and self.versions == tuple(version_of(t) for t in tensors)


_NOTHING_MADE = {"_on_demand": None, "_lent": None, "_lent_version": 0, "_compare_lent": False}


class InferenceLayer(nn.Module):
    """What sparse layers have in common: the weights in bundles of rows.

    Attributes:
        values: float32, (entries, height): see `kernels.row_bundles`.
        columns: int32, (entries,).
        starts: int32, (bundles + 1,).
        bias: float32, (outputs,), or None.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    bias: nn.Parameter | None
    _made: dict[bool, _Made]
    _on_demand: WeightOnDemand | None
    _lent: nn.Parameter | None  # the dense weight, once its values were read
    _lent_version: int
    _compare_lent: bool
    activation = "none"  # models pickled by version 0.1 have it here, instead of in their graph

    def _hold(self, matrix: Tensor, bias: Tensor | None, height: int | None) -> None:
        """Take over weights; the attributes of the dense layer are there by then."""
        self._parameters.clear()
        self._weight_shape: tuple[int, ...] = tuple(matrix.shape)
        self.outputs, self.inputs = matrix.shape[0], matrix[:1].numel() if len(matrix) else 0
        with torch.inference_mode(False), torch.no_grad():
            weights = bundle(matrix.detach().cpu().float().flatten(1).contiguous(), height)
            own_bias = None if bias is None else bias.detach().cpu().float().clone()
        self.values = _frozen(weights.values)
        self.register_buffer("columns", weights.columns)
        self.register_buffer("starts", weights.starts)
        self.bias = None if own_bias is None else _frozen(own_bias)
        self._forget()

    @property
    def weight(self) -> Any:
        """The dense weight: what it is costs nothing, its values are made when they are read."""
        own = self._parameters.get("weight")
        if own is not None:
            return own
        if self._on_demand is None:
            # Not by assignment, which would register what says that it is a parameter.
            made = WeightOnDemand(self._weight_shape, self.values, self._lend)
            vars(self)["_on_demand"] = made
        return self._on_demand

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a weight that is assigned makes the layer dense."""
        if name == "weight":
            self._become_dense(value)
        else:
            super().__setattr__(name, value)

    @property
    def density(self) -> float:
        """Stored share of the weights."""
        if self.is_dense:
            return 1.0
        return self.values.numel() / max(1, self.outputs * self.inputs)

    @property
    def is_dense(self) -> bool:
        """Whether somebody gave the layer a dense weight."""
        return self._parameters.get("weight") is not None

    @property
    def lent(self) -> bool:
        """Whether somebody has read the values of the dense weight."""
        return self._lent is not None

    def product(self, norm: Sequence[Any] | None = None) -> Product:
        """Return W x + b, normalised if asked; made anew when one of its tensors changes.

        Args:
            norm: The fields of a `Norm`.
        """
        tensors = (self.values, self.columns, self.starts, self.bias, *(norm or ())[:4])
        made = self._made.get(norm is not None)
        if made is None or not made.holds(tensors):
            versions = tuple(version_of(t) for t in tensors)
            made = _Made(tensors, versions, self._make(norm))
            self._made[norm is not None] = made
        return made.product

    def _make(self, norm: Sequence[Any] | None) -> Product:
        values, bias = self.values.detach(), self.bias
        w = RowBundles(values, self.columns, self.starts, self.outputs, self.inputs)
        if norm is None:
            return Product(w, bias)
        scale, shift = Norm(*norm).scale_and_shift()
        rows = scale.new_zeros(w.count * w.height)
        rows[: self.outputs] = scale
        scaled = values.double() * rows.view(-1, w.height)[w.bundle_of_entry()]
        folded = shift if bias is None else shift + scale * bias.double()
        w = RowBundles(scaled.to(values), self.columns, self.starts, self.outputs, self.inputs)
        return Product(w, folded.to(values))

    def _lend(self) -> Tensor:
        """Return the dense weight; what is written into it is noticed when the layer runs next."""
        if self.is_dense:
            return cast("Tensor", self._parameters["weight"])
        if self._lent is None:
            with torch.inference_mode(False), torch.no_grad():
                vars(self)["_lent"] = _frozen(self._dense())
        self._compare_lent = True
        return cast("Tensor", self._lent)

    def _dense(self) -> Tensor:
        w = RowBundles(self.values, self.columns, self.starts, self.outputs, self.inputs)
        return w.dense().view(self._weight_shape)

    def _take_back(self) -> None:
        """Become dense if what was lent has been written.

        torch counts writes; those through `.data` and NumPy it does not count, so that right after
        lending the values are compared.
        """
        lent = self._lent
        assert lent is not None
        if self._compare_lent or lent._version != self._lent_version:
            self._compare_lent, self._lent_version = False, lent._version
            changed = lent.shape != self._weight_shape or not torch.equal(lent, self._dense())
            if changed:
                self._become_dense(lent)
                warnings.warn(
                    "The weight of a sparse layer was written: it is dense from now on. For a "
                    "sparse one, change the original model and accelerate that.",
                    UserWarning,
                    stacklevel=4,
                )

    def _become_dense(self, weight: Any) -> None:
        if not isinstance(weight, nn.Parameter):
            raise DeployError(
                f"A layer's weight is an nn.Parameter; it was given a {type(weight).__name__}."
            )
        if isinstance(weight, WeightOnDemand):
            weight = weight._dense()
        if tuple(weight.shape) != self._weight_shape:
            raise DeployError(
                f"The weight of this layer has shape {self._weight_shape}; it was given "
                f"{tuple(weight.shape)}."
            )
        for name in ("columns", "starts"):
            self._buffers.pop(name, None)
        self._parameters.pop("values", None)
        self._parameters["weight"] = weight
        self._forget()

    def _forget(self) -> None:
        """Forget what was made from the weights."""
        vars(self).update(_NOTHING_MADE, _made={})

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self._lent is not None:
            self._take_back()
        applied = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._forget()
        return applied

    def __getstate__(self) -> dict[str, Any]:
        if self._lent is not None:
            self._take_back()
        return {**vars(self), **_NOTHING_MADE, "_made": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_weight_shape" not in state:
            self._take_over_version_0_1()

    def _take_over_version_0_1(self) -> None:
        """Make what version 0.1 pickled a layer of today, which is a Linear or Conv2d."""
        old = vars(self)
        for name in ("values", "bias"):
            tensor = self._buffers.pop(name)
            self._parameters[name] = None if tensor is None else _frozen(tensor)
        self._weight_shape = (self.outputs, self.inputs)
        self.in_features, self.out_features = self.inputs, self.outputs
        if "kernel" in old:
            self._weight_shape = (self.outputs, old["channels"], *old["kernel"])
            self.in_channels, self.out_channels = old["channels"], self.outputs
            self.kernel_size, self.zeros = old["kernel"], old["padding"]
            self.groups, self.padding_mode = 1, "zeros"
            self.transposed, self.output_padding = False, (0, 0)
        self._forget()

    def _refuse_training(self, *tensors: Tensor | None) -> None:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            raise DeployError(
                "This layer was accelerated for inference and has no gradient: run it under "
                "torch.no_grad() or torch.inference_mode(), and train the original model."
            )

    def extra_repr(self) -> str:
        """Say what the layer is."""
        if self.is_dense:
            return f"{super().extra_repr()}, dense again"
        rows = self.values.shape[1]
        return f"{super().extra_repr()}, density={self.density:.4f}, rows={rows}"


class InferenceLinear(InferenceLayer, nn.Linear):  # type: ignore[misc, override]
    """`nn.Linear` with a sparse weight, for inference.

    Args:
        linear: The layer to take over.
        height: Rows that share their columns; by default as its zeros suggest.
    """

    def __init__(self, linear: nn.Linear, height: int | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._hold(linear.weight, linear.bias, height)
        self.train(linear.training)

    def forward(
        self,
        input: Tensor,
        addend: Tensor | None = None,
        activation: str = "none",
        norm: Sequence[Any] | None = None,
        feature_major: bool = False,
    ) -> Tensor:
        """Apply to the last dimension.

        Args:
            input: (…, inputs).
            addend: (…, outputs), added before the activation.
            activation: `"none"`, `"relu"` or `"gelu"`.
            norm: A batch norm before the addend: the fields of a `Norm`.
            feature_major: Whether the result is stored outputs first.
        """
        x, activation = input, self.activation if activation == "none" else activation
        if _in_a_program():
            self._refuse_training(x)
            return self._in_program(x)
        if self._lent is not None:
            self._take_back()
        if self.is_dense:
            return _finish(F.linear(x, self.weight, self.bias), norm, addend, activation)
        self._refuse_training(x, addend)
        if x.shape[-1:] != (self.inputs,):
            raise DeployError(
                f"This layer has {self.inputs} inputs; it was given a tensor of {tuple(x.shape)}."
            )
        product, lead = self.product(norm), x.shape[:-1]
        if addend is not None and not _fits(addend, x, (*lead, self.outputs)):
            return _finish(_unflatten(product.linear(_samples(x)), lead), None, addend, activation)
        flat_addend = None if addend is None else _samples(addend)
        return _unflatten(product.linear(_samples(x), flat_addend, activation, feature_major), lead)

    def _in_program(self, x: Tensor) -> Tensor:
        if self.is_dense:
            return F.linear(x, self.weight, self.bias)
        parts = (self.values, self.columns, self.starts, self.bias)
        return cast("Tensor", sparse_linear(x, *parts, self.outputs))


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
        self._hold(conv.weight, conv.bias, height)
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
        norm: Sequence[Any] | None = None,
    ) -> Tensor:
        """Apply to images.

        Args:
            input: ([images,] channels, rows, columns).
            addend: Shaped like the output, added before the activation.
            activation: `"none"`, `"relu"` or `"gelu"`.
            norm: A batch norm before the addend: the fields of a `Norm`.
        """
        x, activation = input, self.activation if activation == "none" else activation
        if _in_a_program():
            self._refuse_training(x)
            return self._in_program(x)
        if self._lent is not None:
            self._take_back()
        if self.is_dense:
            y = self._conv_forward(x, self.weight, self.bias)
            return _finish(y, norm, addend, activation)
        self._refuse_training(x, addend)
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
    if kind not in (nn.Linear, nn.Conv2d):
        return f"{kind.__name__}: no sparse layer of this class"
    if "forward" in vars(module):
        return "its forward was replaced"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has hooks, which a sparse layer would lose"
    weight = module.weight
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided:
        return f"its weight is a {type(weight).__name__} ({weight.layout})".replace("torch.", "")
    if weight.dtype is not torch.float32 or weight.device.type != "cpu":
        return f"{weight.dtype} on {weight.device.type}".replace("torch.", "")
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return f"{module.groups} groups: no kernel for them"
        if module.padding_mode != "zeros" or _padding(module) is None:
            return "no kernel for its padding"
    return ""


def inference_layer(module: nn.Module, height: int | None = None) -> InferenceLayer:
    """Return the sparse layer for a replaceable one."""
    if isinstance(module, nn.Linear):
        return InferenceLinear(module, height)
    assert isinstance(module, nn.Conv2d)
    return InferenceConv2d(module, height)


def _in_a_program() -> bool:
    """Whether torch is recording a program: compiling, exporting or tracing."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _finish(
    y: Tensor, norm: Sequence[Any] | None, addend: Tensor | None, activation: str
) -> Tensor:
    if norm is not None:
        weight, bias, mean, variance, eps = norm
        y = F.batch_norm(y, mean, variance, weight, bias, eps=eps)
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
