"""Converts the Linear and Conv2d layers of a model to always-sparse ones, and back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from spartan.always_sparse.convolution import SparseConv2d, pair
from spartan.always_sparse.layer import SparseLayer, warn_of_unconnected
from spartan.always_sparse.linear import SparseLinear
from spartan.always_sparse.random_graphs import random_connections
from spartan.budgets.budget import Budget
from spartan.errors import BudgetError, PrunableError
from spartan.kernels.connections import Connections
from spartan.weights.patterns import Unstructured
from spartan.weights.prunable import NameFilter, Prunable, find_prunable


def convert(
    model: nn.Module,
    density: float | None = None,
    allocation: str | Mapping[str, float] = "er",
    include: NameFilter | None = None,
    exclude: NameFilter | None = None,
    every_unit: bool = False,
) -> nn.Module:
    """Replace the Linear and Conv2d layers of a model by always-sparse ones, in place.

    Each gets a random graph, and weights drawn anew for it (`SparseLayer.reset_parameters`); biases
    stay the parameters they are. Optimizers must be made after this: the weights that one made
    before would step are gone. To sparsify what a dense model has learned, use a dense-to-sparse
    method instead.

    Args:
        model: Any module.
        density: Connections as a fraction of the weights of all converted layers: exactly
            round(density * weights).
        allocation: How they spread over layers: `"er"`, `"erk"`, `"uniform"` or a mapping from
            name to density, see `Budget`. Layers that saturate hand their excess to the others.
        include: Which weights to convert, see `find_prunable`.
        exclude: Which not.
        every_unit: Give every output unit at least one connection.

    Returns:
        The model; a new layer if the model is itself a single layer.

    Raises:
        BudgetError: The density cannot be reached.
        PrunableError: A name matches nothing, or there is nothing to convert.
    """
    if allocation == "global":
        raise BudgetError(
            "A graph is drawn layer by layer: allocation= is 'er', 'erk', 'uniform' or a mapping."
        )
    targets = _targets(model, find_prunable(model, include, exclude))
    weights = list(targets)
    budget = Budget(density, allocation=allocation)
    graphs: dict[str, Connections] = {}
    for group in budget.plan(model, weights, Unstructured()):
        weight, count = weights[group.members[0]], int(group.kept)
        outputs, inputs = weight.shape[0], math.prod(weight.shape[1:])
        if every_unit and count < outputs:
            raise BudgetError(
                f"{weight.name!r} gets {count:,} connections for {outputs:,} output units, so not "
                "every unit can have one: raise the density, or spread it otherwise."
            )
        graphs[weight.name] = random_connections(outputs, inputs, count, every_unit)
    warn_of_unconnected(graphs, stacklevel=3)
    made = {module: _sparse(module, graphs[weight.name]) for weight, module in targets.items()}
    model.register_load_state_dict_pre_hook(check_first)
    return _replaced(model, made)


def to_dense(model: nn.Module) -> nn.Module:
    """Replace the always-sparse layers of a model by dense ones of the same weights, in place.

    Returns:
        The model; a new layer if the model is itself a single layer.
    """
    return _replaced(model, {layer: layer.to_dense() for layer in sparse_layers(model).values()})


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """Return the always-sparse layers of a model by name, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}


def dense_state(
    state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Return what a model's state dict would be with dense layers.

    Args:
        state: A state dict, perhaps of always-sparse layers.
        shapes: Shapes of their weights, were they dense, by the names these would have.
    """
    dense = dict(state)
    for name, shape in shapes.items():
        prefix = name.removesuffix("weight")
        if f"{prefix}row_starts" not in state:
            continue
        starts, columns = dense.pop(f"{prefix}row_starts"), dense.pop(f"{prefix}columns")
        values = dense.pop(f"{prefix}values")
        graph = Connections(starts, columns, math.prod(shape[1:]))
        dense[name] = graph.dense(values).view(*shape)
    return dense


def density(model: nn.Module) -> float:
    """Return the connections of all always-sparse layers as a fraction of their pairs.

    Raises:
        PrunableError: The model has no such layer.
    """
    layers = sparse_layers(model).values()
    if not layers:
        raise PrunableError("The model has no always-sparse layer: see always_sparse.convert.")
    pairs = sum(math.prod(layer.matrix_shape) for layer in layers)
    return sum(layer.values.numel() for layer in layers) / pairs


def check_first(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a damaged state before any layer has loaded its part."""
    for name, layer in sparse_layers(model).items():
        layer.connections_of(state, f"{prefix}{name}." if name else prefix)


def _targets(model: nn.Module, weights: list[Prunable]) -> dict[Prunable, nn.Module]:
    """Return the modules to replace, by their weights."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    inside = {
        child
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.children()
    }
    targets: dict[Prunable, nn.Module] = {}
    left = []
    for weight in weights:
        found = owners[weight.parameter]
        if len(found) > 1:
            raise PrunableError(f"{weight.name!r} is tied to another layer's weight: exclude it.")
        if weight.parameter.is_meta:
            raise PrunableError(
                f"{weight.name!r} is on the meta device and a graph has no place there: move it "
                "to a device first (model.to_empty), or build it of always_sparse.SparseLinear."
            )
        if _convertible(found[0]) and found[0] not in inside:
            targets[weight] = found[0]
        else:
            left.append(repr(weight.name))
    if not targets:
        raise PrunableError("Nothing to convert: the model has no nn.Linear or nn.Conv2d for it.")
    if left:
        warnings.warn(
            f"{', '.join(left)} stay dense: what is converted are nn.Linear, outside of attention "
            "modules, and nn.Conv2d with one group and zero padding.",
            stacklevel=3,
        )
    return targets


def _convertible(module: nn.Module) -> bool:
    # Subclasses compute something else, or are read by others.
    if type(module) is nn.Conv2d:
        plain = module.groups == 1 and module.padding_mode == "zeros"
        return plain and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def _sparse(module: nn.Module, connections: Connections) -> SparseLayer:
    weight, bias = module.get_parameter("weight"), module._parameters["bias"]
    made: dict[str, Any] = {
        "connections": connections,
        "device": weight.device,
        "dtype": weight.dtype,
    }
    layer: SparseLayer
    if isinstance(module, nn.Conv2d):
        assert not isinstance(module.padding, str)
        layer = SparseConv2d(
            module.in_channels,
            module.out_channels,
            pair(module.kernel_size),
            pair(module.stride),
            pair(module.padding),
            pair(module.dilation),
            bias is not None,
            **made,
        )
    else:
        assert isinstance(module, nn.Linear)
        layer = SparseLinear(module.in_features, module.out_features, bias is not None, **made)
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        warnings.warn(
            f"The hooks of {module} are not those of the layer that replaces it.", stacklevel=4
        )
    layer.values.requires_grad_(weight.requires_grad)
    layer.bias = bias
    layer.train(module.training)
    return layer


def _replaced(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in made:
                setattr(parent, name, made[child])
                if isinstance(parent, nn.TransformerEncoderLayer):
                    # Its fast path reads weights past the layers.
                    parent.activation_relu_or_gelu = 0
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False  # so does this one's
    return made.get(model, model)
