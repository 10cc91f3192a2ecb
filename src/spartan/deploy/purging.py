"""Removing channels that are zero, so that what is left is a smaller dense model.

A channel whose weights are all zero computes a constant: its bias, after the activation. Where one
layer alone reads it, the constant moves into that layer's bias, and the channel goes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from spartan.deploy.graph import calls, calls_one_of, module_of, only_user, simplify, trace
from spartan.errors import DeployError

_POINTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU)
_POINTWISE_CALLS = {F.relu, torch.relu, "relu", "relu_", F.gelu, F.silu, torch.sigmoid, torch.tanh}
# Pools whose padding does not show in a constant.
_POOLS = (nn.AdaptiveAvgPool2d, nn.MaxPool2d)


@dataclass(frozen=True)
class Purged:
    """A model without its zero channels.

    Attributes:
        model: The smaller model, a graph.
        removed: Channels removed, by layer.
    """

    model: fx.GraphModule
    removed: dict[str, int]


def purge(model: nn.Module, example_input: Any) -> Purged:
    """Remove zero channels.

    Channels that a residual connection or a concatenation reads stay. Batch norms are folded first.

    Args:
        model: The model; it is not changed.
        example_input: One input.

    Raises:
        DeployError: torch.fx cannot trace the model.
    """
    traced = trace(copy.deepcopy(model).eval(), example_input)
    if traced is None:
        raise DeployError(
            "torch.fx cannot trace this model, so nobody knows which layer reads which channel; "
            "export it without purging."
        )
    simplify(traced)
    counts = calls(traced)
    removed = {}
    with torch.no_grad():
        for node in traced.graph.nodes:
            layer = module_of(traced, node)
            if not _plain(layer) or counts[node.target] != 1:
                continue
            path = _path_to_reader(traced, node)
            reader = module_of(traced, path[-1]) if path else None
            if not _plain(reader) or counts[path[-1].target] != 1:
                continue
            number = _remove(layer, reader, [(n, module_of(traced, n)) for n in path[:-1]])
            if number:
                removed[str(node.target)] = number
    return Purged(traced, removed)


def _plain(layer: nn.Module | None) -> bool:
    return type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1)


def _path_to_reader(traced: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Return the nodes from behind a layer to the one layer that reads it; empty if none.

    Between them, channels must stay what they are: the second dimension of images, until they are
    flattened, or the last one of features.
    """
    images = isinstance(module_of(traced, node), nn.Conv2d)
    flat = False
    path: list[fx.Node] = []
    while True:
        following = only_user(node)
        if following is None or following.args[:1] != (node,):
            return []
        path.append(following)
        module = module_of(traced, following)
        if isinstance(module, nn.Conv2d):
            return path if images and not flat else []
        if isinstance(module, nn.Linear):
            return path if flat or not images else []
        if images and not flat and _flattens(following, module):
            flat = True
        elif not _keeps_channels(following, module, images and not flat):
            return []
        node = following


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node turns (N, C, H, W) into (N, C x H x W)."""
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    called = calls_one_of(node, {torch.flatten, "flatten"})
    return called and node.args[1:] in ((1,), (1, -1)) and not node.kwargs


def _keeps_channels(node: fx.Node, module: nn.Module | None, images: bool) -> bool:
    if module is not None:
        return isinstance(module, (*_POINTWISE, *(_POOLS if images else ())))
    return calls_one_of(node, _POINTWISE_CALLS)


def _remove(layer: Any, reader: Any, between: list[tuple[fx.Node, nn.Module | None]]) -> int:
    """Remove the zero outputs of a layer; returns how many."""
    dead = ~(layer.weight != 0).flatten(1).any(1)
    bias = layer.weight.new_zeros(len(dead)) if layer.bias is None else layer.bias.detach()
    constant = _through(bias, between)
    # A padded convolution sees the constant inside the image only.
    if isinstance(reader, nn.Conv2d) and reader.padding not in ("valid", (0, 0)):
        dead &= constant == 0
    if dead.all():
        dead[0] = False  # a layer needs an output
    repeats, rest = divmod(reader.weight.shape[1], len(dead))
    if not dead.any() or rest:
        return 0
    dead_inputs = dead.repeat_interleave(repeats)
    reading = (
        reader.weight[:, dead_inputs].flatten(2).sum(2)
        if reader.weight.dim() > 2
        else (reader.weight[:, dead_inputs])
    )
    shift = reading @ constant[dead].repeat_interleave(repeats)
    if shift.any():
        reader.bias = nn.Parameter(shift if reader.bias is None else reader.bias + shift)
    _keep_outputs(layer, ~dead)
    _keep_inputs(reader, ~dead_inputs)
    return int(dead.sum())


def _through(constant: Tensor, between: list[tuple[fx.Node, nn.Module | None]]) -> Tensor:
    """Return what becomes of a constant channel on its way."""
    for node, module in between:
        if isinstance(module, _POINTWISE):
            constant = module(constant.clone())
        elif node.target in ("relu", "relu_"):
            constant = constant.relu()
        elif node.op == "call_function" and node.target in _POINTWISE_CALLS:
            settings = {k: v for k, v in node.kwargs.items() if k != "inplace"}
            constant = node.target(constant, **settings)  # type: ignore[operator]
    return constant


def _keep_outputs(layer: Any, keep: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight[keep].contiguous())
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[keep].contiguous())
    name = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
    setattr(layer, name, int(keep.sum()))


def _keep_inputs(layer: Any, keep: Tensor) -> None:
    layer.weight = nn.Parameter(layer.weight[:, keep].contiguous())
    name = "in_features" if isinstance(layer, nn.Linear) else "in_channels"
    setattr(layer, name, int(keep.sum()))
