"""`InferenceLayer`: sparse weights for inference, behind the face of a dense layer.

To the code around it a sparse layer is the dense layer it came from: a subclass, with its sizes,
its bias, and a `weight` that is made dense when its values are read. Who writes into that weight,
or assigns another, gets a dense layer from then on.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spartan.deploy.weight_on_demand import WeightOnDemand
from spartan.errors import DeployError
from spartan.kernels.products import Product
from spartan.kernels.row_bundles import RowBundles, bundle


class _Made:
    """A product, and what its tensors held when it was made.

    torch counts the writes into a tensor, but not those through `.data`, NumPy or inference mode.
    So small tensors are compared byte by byte, and a sample of large ones, besides the count.

    Args:
        product: The product.
        layer: Its tensors are asked for by name, as somebody may exchange them.
        norm: Another module with tensors that went into the product, or None.
    """

    def __init__(self, product: Product, layer: nn.Module, norm: nn.Module | None) -> None:
        self.product = product
        parts = [
            part
            for module in (layer, norm)
            if module is not None
            for part in (module._parameters, module._buffers)
        ]
        found = [(part, name, x) for part in parts for name, x in part.items() if x is not None]
        self._parts: list[Any] = [part for part, _, _ in found]
        self._names = [name for _, name, _ in found]
        self._tensors: list[Tensor] = [tensor for _, _, tensor in found]
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._versions = [tensor._version for tensor in self._counted]
        self._samples = [_sample(x) for x in self._tensors if x.is_floating_point()]
        self._bytes = [sample.tobytes() for sample in self._samples]

    def holds(self) -> bool:
        """Whether all tensors are the same, and hold the same as far as can be seen."""
        now = map(dict.get, self._parts, self._names)
        return (
            all(map(operator.is_, now, self._tensors))
            and [tensor._version for tensor in self._counted] == self._versions
            and [tensor.data_ptr() for tensor in self._tensors] == self._places
            and [sample.tobytes() for sample in self._samples] == self._bytes
        )


def _sample(tensor: Tensor) -> NDArray[np.generic]:
    """Return entries of a tensor on its own memory; none if NumPy has no such tensors."""
    plain = tensor.dtype in (torch.float32, torch.float64) and tensor.is_contiguous()
    if not plain or tensor.device.type != "cpu":
        return np.empty(0)
    step = 1 if tensor.numel() <= _WHOLE else tensor.numel() // _SAMPLE
    entries: NDArray[np.generic] = tensor.detach().view(-1).numpy()[::step]
    return entries


# Entries of a tensor that are compared at each call: all of biases and norms, a sample of weights.
_WHOLE, _SAMPLE = 4096, 32

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
    _made: dict[nn.Module | None, _Made]
    _on_demand: WeightOnDemand | None
    _lent: nn.Parameter | None  # the dense weight, once its values were read
    _lent_version: int
    _compare_lent: bool
    activation = "none"  # models pickled by version 0.1 have it here, instead of in their graph

    def hold(self, matrix: Tensor, bias: Tensor | None, height: int | None) -> None:
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
            return
        super().__setattr__(name, value)
        if name in ("values", "columns", "starts", "bias"):
            self._forget()

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

    def product(self, norm: Any = None) -> Product:
        """Return W x + b, normalised if asked; made anew when one of its tensors is written.

        Args:
            norm: A batch norm in evaluation, whose tensors are not exchanged.
        """
        made = self._made.get(norm)
        if made is None or not made.holds():
            made = self._made[norm] = _Made(self._make(norm), self, norm)
        return made.product

    def _make(self, norm: Any) -> Product:
        values, bias = self.values.detach(), self.bias
        w = RowBundles(values, self.columns, self.starts, self.outputs, self.inputs)
        if norm is None:
            return Product(w, bias)
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        shift = shift if norm.bias is None else shift + norm.bias.double()
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

    def matrix(self) -> Tensor:
        """Return the weight as (outputs, inputs), dense."""
        return RowBundles(self.values, self.columns, self.starts, self.outputs, self.inputs).dense()

    def _dense(self) -> Tensor:
        """Return the weight in its shape."""
        return self.matrix().view(self._weight_shape)

    def take_back(self) -> None:
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
            self.take_back()
        applied = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._forget()
        return applied

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._lent is not None:
            self.take_back()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, Tensor) and not self.is_dense and f"{prefix}values" not in state_dict:
            with torch.inference_mode(False), torch.no_grad():
                self._become_dense(_frozen(self._dense()))  # of the dense model: it is loaded next
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; a weight makes the layer dense."""
        if name == "weight" and param is not None:
            self._become_dense(param)
        else:
            super().register_parameter(name, param)

    def __getstate__(self) -> dict[str, Any]:
        if self._lent is not None:
            self.take_back()
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

    def refuse_unrecorded(self) -> None:
        """Raise `DeployError` if a program would be recorded without what was written.

        While it records, torch compares no values and exchanges no parameters.
        """
        lent = self._lent
        if lent is not None and (self._compare_lent or lent._version != self._lent_version):
            raise DeployError(
                "The weight of a sparse layer was read, and perhaps written, since the model last "
                "ran: run it once before you trace, export or compile it."
            )

    def refuse_training(self, *tensors: Tensor | None) -> None:
        """Raise `DeployError` if one of these tensors wants a gradient."""
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


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
