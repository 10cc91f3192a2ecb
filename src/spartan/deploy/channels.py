"""Channel dataflow of a traced model: which layers share channels, which are constant.

A layer that mixes its inputs (a convolution, a Linear) writes a new *space* of channels. What works
on each channel by itself (activations, pools, batch norms, depthwise convolutions) stays in the
space; an addition makes two spaces one. A space that anything else reads is pinned: it has to stay
as it is. Along the way goes what is known of each channel: the constant that it holds everywhere,
because the weights before it are zero, or nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from spartan.deploy.folding import require_matrix
from spartan.deploy.graph_nodes import calls, calls_one_of, changes_in_place, module_of

_POINTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh),
    *(nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Mish, nn.Identity),
)
_POINTWISE_CALLS: dict[Any, Callable[..., Tensor]] = {
    **{f: f for f in (F.relu, F.relu6, F.gelu, F.silu, F.hardswish, F.leaky_relu, F.elu, F.mish)},
    **{f: f for f in (torch.relu, torch.sigmoid, torch.tanh, F.sigmoid, F.tanh)},
    torch.relu_: torch.relu,
    "relu": torch.relu,
    "relu_": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "contiguous": lambda x: x,
    require_matrix: lambda x: x,
}
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_POOLS = (
    *(nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
)
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_WHOLE_POOL_CALLS = {
    *(F.max_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d),
    *(F.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
    *(F.max_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d),
}
_POOL_CALLS = _WHOLE_POOL_CALLS | {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Channels:
    """What is known of the channels of a tensor.

    Attributes:
        space: Number of the space they are in.
        constant: For each, the number it holds everywhere; NaN if it is not constant. Float64.
        layout: `"image"` (N, C, …), `"features"` (…, C), `"matrix"` (N, C), or `"flat"`: an image
            flattened to (N, C x …).
        spatial: Dimensions of an image after its channels: 1, 2 or 3.
    """

    space: int
    constant: Tensor
    layout: str
    spatial: int = 0


class ChannelFlow:
    """The channels of all tensors in a graph.

    Attributes:
        readers: Mixing layers and the channels they read, None where nothing is known of them.
        writers: Mixing layers and the channels they write.
        followers: Layers with parameters of their own for each channel, and the channels.
        pinned: Spaces that have to stay.

    Args:
        traced: The graph, in evaluation mode.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        self.readers: list[tuple[fx.Node, Any, Channels | None]] = []
        self.writers: list[tuple[fx.Node, Any, Channels]] = []
        self.followers: list[tuple[Any, Channels]] = []
        self.pinned: set[int] = set()
        self._parents: list[int] = []
        self._known: dict[fx.Node, Channels] = {}
        self._matrices: set[fx.Node] = set()  # nodes known to have two dimensions
        self._aliases: dict[fx.Node, list[fx.Node]] = {}  # nodes that may share memory
        counts = calls(traced)
        for node in traced.graph.nodes:
            module = module_of(traced, node)
            once = node.op != "call_module" or counts[node.target] == 1
            if once and _flattens(node, module):
                self._matrices.add(node)
            self._note_alias(node, module)
            found = self._follow(node, module) if once else None
            if found is not None:
                self._known[node] = found
            elif not self._is_batch_size(node):
                for source in node.all_input_nodes:
                    self._pin(source)
        self.pinned = {self.root(space) for space in self.pinned}

    def root(self, space: int) -> int:
        """Return the number by which a space goes, after it became one with others."""
        while self._parents[space] != space:
            space = self._parents[space]
        return space

    def _is_batch_size(self, node: fx.Node) -> bool:
        """Whether a node asks for the size of a dimension that cannot be that of channels."""
        sources = [self._known.get(source) for source in node.all_input_nodes]
        return _asks_for_batch(node) and all(x is None or x.layout != "features" for x in sources)

    def _pin(self, node: fx.Node) -> None:
        if node in self._known:
            self.pinned.add(self._known[node].space)

    def _note_alias(self, node: fx.Node, module: nn.Module | None) -> None:
        """Forget what is known of tensors that this node changes for others to read."""
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source is None:
            return
        in_place = changes_in_place(node, module)
        if not (in_place or isinstance(module, nn.Identity | nn.Flatten) or _views(node)):
            return
        family = self._aliases.setdefault(source, [source])
        family.append(node)
        self._aliases[node] = family
        readers = {user for member in family for user in member.users} - set(family)
        if in_place and (readers - set(node.users) or any(n is not node for n in source.users)):
            for member in family:
                self._pin(member)
                if member in self._known:
                    known = self._known[member]
                    nothing = torch.full_like(known.constant, torch.nan)
                    self._known[member] = replace(known, constant=nothing)

    def _new_space(self) -> int:
        self._parents.append(len(self._parents))
        return len(self._parents) - 1

    def _unite(self, a: Channels, b: Channels) -> None:
        self._parents[self.root(b.space)] = self.root(a.space)

    def _follow(self, node: fx.Node, module: nn.Module | None) -> Channels | None:
        """Return the channels a node writes; None if it is none of what is understood."""
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        x = self._known.get(node.args[0])
        if mixes(module) and len(node.args) == 1 and not node.kwargs:
            return self._mix(node, module, x)
        if x is None or node.op not in ("call_module", "call_function", "call_method"):
            return None
        if calls_one_of(node, _SUMS) or calls_one_of(node, _PRODUCTS):
            return self._combine(node)
        if _flattens(node, module):
            return _flatten(x)
        return _through_call(node, x) if module is None else self._through_module(module, x)

    def _mix(self, node: fx.Node, layer: Any, x: Channels | None) -> Channels:
        image = isinstance(layer, CONVOLUTIONS)
        source = node.args[0]
        matrix = source in self._matrices or (x is not None and x.layout in ("matrix", "flat"))
        if x is not None and (x.layout == "image") != image:
            self._pin(node.args[0])  # type: ignore[arg-type]
            x = None
        self.readers.append((node, layer, x))
        constant = _constant_outputs(layer, x)
        layout = "image" if image else "matrix" if matrix or _rank(node) == 2 else "features"
        spatial = layer.weight.dim() - 2 if image else 0
        y = Channels(self._new_space(), constant, layout, spatial)
        self.writers.append((node, layer, y))
        return y

    def _combine(self, node: fx.Node) -> Channels | None:
        """Follow a sum or product of two tensors, or of a tensor and a number."""
        if len(node.args) != 2 or node.kwargs:
            return None
        x, y = (self._known.get(a) if isinstance(a, fx.Node) else a for a in node.args)
        if not isinstance(x, Channels):
            return None
        if isinstance(y, Channels):
            if y.layout != x.layout or len(y.constant) != len(x.constant):
                return None
            self._unite(x, y)
            other: Tensor | float = y.constant
        elif isinstance(y, int | float):
            other = float(y)
        else:
            return None
        if calls_one_of(node, _SUMS):
            return replace(x, constant=x.constant + other)
        product = x.constant * other
        zero = (x.constant == 0) | (torch.as_tensor(other) == 0)
        return replace(x, constant=torch.where(zero, 0.0, product))

    def _through_module(self, module: nn.Module, x: Channels) -> Channels | None:
        if isinstance(module, _POINTWISE):
            return replace(x, constant=_apply(module, x.constant))
        if isinstance(module, _POOLS) and x.layout == "image":
            if getattr(module, "return_indices", False):
                return None
            # The average of a constant and of padding depends on the place.
            average = isinstance(module, _AVERAGES)
            plain = average and not _any(module.padding)
            plain = plain and getattr(module, "divisor_override", None) is None
            return replace(x, constant=_unless(average and not plain, x.constant))
        if isinstance(module, _NORMS) and module.running_mean is not None:
            spatial = _NORMS.index(type(module)) + 1 if type(module) in _NORMS else -1
            fits = x.spatial == spatial or (spatial == 1 and x.layout == "matrix")
            if fits and x.layout in ("image", "matrix") and len(x.constant) == module.num_features:
                self.followers.append((module, x))
                return replace(x, constant=_normalise(module, x.constant))
        if _depthwise(module) and x.layout == "image":
            self.followers.append((module, x))
            return replace(x, constant=_depthwise_constant(module, x.constant))
        return None


def mixes(layer: nn.Module | None) -> bool:
    """Whether every output of a layer may read every input."""
    if isinstance(layer, CONVOLUTIONS) and type(layer) in CONVOLUTIONS:
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return type(layer) is nn.Linear


def padded(layer: nn.Module) -> bool:
    """Whether a layer sees zeros around the image, so that a constant channel is not one to it."""
    return isinstance(layer, CONVOLUTIONS) and layer.padding != "valid" and _any(layer.padding)


def by_channel(layer: Any, channels: int) -> Tensor:
    """Return the weight of a mixing layer as (outputs, channels, weights of one channel)."""
    weight: Tensor = layer.weight.detach()
    return weight.reshape(weight.shape[0], channels, -1)


def _constant_outputs(layer: Any, x: Channels | None) -> Tensor:
    weight = layer.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
    if x is None:
        varies = weight.flatten(1).any(1)
        return torch.where(varies, torch.nan, bias)
    weight = by_channel(layer, len(x.constant)).double()
    known = ~x.constant.isnan() & (~torch.tensor(padded(layer)) | (x.constant == 0))
    varies = weight[:, ~known].flatten(1).any(1)
    constant = bias + weight.sum(2) @ torch.where(known, x.constant, 0.0)
    return torch.where(varies, torch.nan, constant)


def _through_call(node: fx.Node, x: Channels) -> Channels | None:
    """Follow a function or method of one tensor."""
    target: Any = node.target
    if calls_one_of(node, _POINTWISE_CALLS.keys()):
        settings = {k: v for k, v in node.kwargs.items() if k != "inplace"}
        simple = all(isinstance(v, int | float | str) for v in (*node.args[1:], *settings.values()))
        function = _POINTWISE_CALLS[target]
        if not simple:
            return None
        return replace(
            x, constant=_apply(lambda c: function(c, *node.args[1:], **settings), x.constant)
        )
    if calls_one_of(node, _POOL_CALLS) and x.layout == "image":
        if node.kwargs.get("return_indices"):
            return None
        return replace(x, constant=_unless(target not in _WHOLE_POOL_CALLS, x.constant))
    if calls_one_of(node, {"view", "reshape"}) and x.layout == "image":
        batch_and_rest = len(node.args) == 3 and node.args[2] == -1
        return _flatten(x) if batch_and_rest and _asks_for_batch(node.args[1]) else None
    if calls_one_of(node, {torch.mean, "mean"}) and x.layout == "image":
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        keep = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
        dims = [dims] if isinstance(dims, int) else dims
        rank = x.spatial + 2
        if isinstance(dims, list | tuple) and sorted(d % rank for d in dims) == [*range(2, rank)]:
            return x if keep else replace(x, layout="matrix", spatial=0)
    return None


def _flatten(x: Channels) -> Channels | None:
    # Features may have more than two dimensions.
    if x.layout == "matrix":
        return x
    return replace(x, layout="flat", spatial=0) if x.layout == "image" else None


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node turns whatever it gets into (N, the rest)."""
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    called = calls_one_of(node, {torch.flatten, "flatten"})
    return called and (*node.args[1:], *node.kwargs.values()) in ((1,), (1, -1))


def _any(padding: Any) -> bool:
    """Whether a layer or pool pads at all."""
    return padding == "same" or bool(padding if isinstance(padding, int) else any(padding))


def _rank(node: fx.Node) -> int | None:
    shape = node.meta.get("shape")
    return None if shape is None else len(shape)


def _views(node: fx.Node) -> bool:
    names = {"view", "reshape", "flatten", "contiguous", torch.flatten}
    return calls_one_of(node, names)


def _reads_shape(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target is not getattr:
        return False
    return bool(node.args[1] == "shape")


def _asks_for_batch(node: Any) -> bool:
    """Whether a node is x.size(0), x.shape[0], or an x.shape of which only that is read."""
    if not isinstance(node, fx.Node):
        return False
    if calls_one_of(node, {"size"}):
        return node.args[1:] == (0,)
    if _reads_shape(node):
        return all(_asks_for_batch(user) for user in node.users)
    item = node.op == "call_function" and node.target is operator.getitem
    return item and _reads_shape(node.args[0]) and bool(node.args[1] == 0)


def _apply(function: Callable[[Tensor], Tensor], constant: Tensor) -> Tensor:
    # What is not known stays unknown, also through functions that map NaN to a number.
    return torch.where(constant.isnan(), torch.nan, function(constant.clone()))


def _unless(condition: bool, constant: Tensor) -> Tensor:
    """Return the constants, unknown where they are not zero if `condition` holds."""
    return torch.where(constant == 0, constant, torch.nan) if condition else constant


def _normalise(norm: Any, constant: Tensor) -> Tensor:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    y: Tensor = (constant - norm.running_mean.double()) * scale
    if norm.affine:
        y = y * norm.weight.detach().double() + norm.bias.detach().double()
    return y


def _depthwise(layer: nn.Module) -> bool:
    return (
        isinstance(layer, CONVOLUTIONS)
        and type(layer) in CONVOLUTIONS
        and 1 < layer.groups == layer.in_channels == layer.out_channels
        and layer.padding_mode == "zeros"
    )


def _depthwise_constant(layer: Any, constant: Tensor) -> Tensor:
    weight = layer.weight.detach().double().flatten(1)
    bias = 0.0 if layer.bias is None else layer.bias.detach().double()
    seen = _unless(padded(layer), constant)
    through = bias + weight.sum(1) * seen
    return torch.where(weight.any(1), through, constant.new_zeros(len(constant)) + bias)
