"""`purge_graph`: removes zero and constant channels from a traced model.

A channel goes where every layer that mixes it in either has zero weights for it, or finds a
constant in it: the constant moves into that layer's bias. A padded convolution sees a constant
inside the image only; there, all constant channels of a space become one, which stays. Channels
that have to stay, as those of a residual stream, are not computed where they are zero: the layer
writes fewer channels, and they are put in their places, or reads only those it has weights for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from spartan.deploy.channels import CONVOLUTIONS, ChannelFlow, Channels, by_channel, padded


def purge_graph(traced: fx.GraphModule, in_place: bool = False) -> dict[str, int]:
    """Remove channels from a graph.

    Args:
        traced: The graph; the layers that it calls are changed.
        in_place: Whether the layers alone may change, and the graph stays as it is.

    Returns:
        How many outputs are no longer computed, by layer.
    """
    removed: dict[str, int] = {}
    with torch.inference_mode(False), torch.no_grad():
        # Layers that lose outputs may be the only ones that read a channel before them.
        while _purge_spaces(traced, removed):
            pass
        if not in_place:
            _skip_zeros(traced, removed)
    traced.graph.lint()
    traced.recompile()
    return removed


def _purge_spaces(traced: fx.GraphModule, removed: dict[str, int]) -> bool:
    """Remove channels from all spaces that may lose some; returns whether any went."""
    flow = ChannelFlow(traced)
    any_gone = False
    for space in {flow.root(y.space) for _, _, y in flow.writers} - flow.pinned:

        def inside(x: Channels | None, space: int = space) -> bool:
            return x is not None and flow.root(x.space) == space

        readers = [(layer, x) for _, layer, x in flow.readers if x is not None and inside(x)]
        gone, carrier = _superfluous(readers)
        if not gone.any():
            continue
        any_gone = True
        for layer, x in readers:
            _read_without(layer, x.constant, gone, carrier)
        for node, layer, y in flow.writers:
            if inside(y):
                _keep_outputs(layer, ~gone)
                removed[str(node.target)] = removed.get(str(node.target), 0) + int(gone.sum())
        for layer, x in flow.followers:
            if inside(x):
                _keep_followed(layer, ~gone)
    return any_gone


def _superfluous(readers: Sequence[tuple[Any, Channels]]) -> tuple[Tensor, int | None]:
    """Return which channels can go, and which of those that stay stands for constant ones."""
    if not readers:
        return torch.zeros(0, dtype=torch.bool), None
    count = len(readers[0][1].constant)
    free = torch.ones(count, dtype=torch.bool)  # go as they are
    constant = free.clone()  # go if one constant channel stays
    strength = torch.full((count,), torch.inf, dtype=torch.float64)
    for layer, x in readers:
        unread = ~by_channel(layer, count).transpose(0, 1).flatten(1).any(1).cpu()
        known = ~x.constant.isnan().cpu()
        zero = x.constant.cpu() == 0
        free &= unread | zero | (known & (not padded(layer)))
        constant &= unread | known
        if padded(layer):
            strength = torch.minimum(strength, x.constant.cpu().nan_to_num(0.0).abs())
    carried = constant & ~free
    carrier = int(torch.where(carried, strength, -1.0).argmax())
    if carried.sum() > 1 and strength[carrier] > 0:
        carried[carrier] = False
        return free | carried, carrier
    if free.all():
        free[0] = False  # a layer needs an output
    return free, None


def _read_without(layer: Any, constant: Tensor, gone: Tensor, carrier: int | None) -> None:
    """Let a layer no longer read some channels, which hold constants or have zero weights."""
    count = len(constant)
    weight = by_channel(layer, count).double()
    values = torch.where(gone.to(constant.device), constant.nan_to_num(0.0), 0.0)
    if not padded(layer):
        shift = weight.sum(2) @ values
        if shift.any():
            old = 0.0 if layer.bias is None else layer.bias
            layer.bias = _like(layer.weight, old + shift)
    elif carrier is not None and values.any():
        share = torch.einsum("ock,c->ok", weight, values / constant[carrier])
        whole = weight.clone()
        whole[:, carrier] += share
        layer.weight = _like(layer.weight, whole.reshape(layer.weight.shape))
    repeats = layer.weight.shape[1] // count
    _keep_inputs(layer, ~gone.repeat_interleave(repeats))


def _skip_zeros(traced: fx.GraphModule, removed: dict[str, int]) -> None:
    """Neither compute zero outputs nor read inputs of zero weights, of channels that stay."""
    flow = ChannelFlow(traced)
    writers = Counter(flow.root(y.space) for _, _, y in flow.writers)
    for node, layer, y in flow.writers:
        # A layer that is alone in its space has lost what it could; what is left stands for others.
        if flow.root(y.space) not in flow.pinned and writers[flow.root(y.space)] == 1:
            continue
        dead = ~layer.weight.flatten(1).any(1)
        if dead.all():
            dead[0] = False
        if _worth_it(dead):
            bias = layer.weight.new_zeros(len(dead)) if layer.bias is None else layer.bias
            places = Places(~dead, torch.where(dead, bias, 0.0), _dim(layer))
            _keep_outputs(layer, ~dead)
            name = str(node.target)
            removed[name] = removed.get(name, 0) + int(dead.sum())
            with traced.graph.inserting_after(node):
                put = _call(traced, f"{name}_places", places)
            node.replace_all_uses_with(put)
            put.args = (node,)
    for node, layer, _ in flow.readers:
        unread = ~layer.weight.transpose(0, 1).flatten(1).any(1)
        if unread.all():
            unread[0] = False
        if _worth_it(unread):
            _keep_inputs(layer, ~unread)
            with traced.graph.inserting_before(node):
                chosen = _call(traced, f"{node.target}_chosen", Chosen(~unread, _dim(layer)))
            chosen.args = (node.args[0],)
            node.args = (chosen,)


def _worth_it(skipped: Tensor) -> bool:
    """Whether skipping these channels saves more than copying the others costs."""
    return int(skipped.sum()) * 8 >= len(skipped)


class Places(nn.Module):
    """Puts channels in their places among constant ones.

    Args:
        live: Which of all channels are given; shape (C,).
        constant: What the others hold; shape (C,).
        dim: Dimension of the channels, counted from the end.
    """

    index: Tensor
    constant: Tensor

    def __init__(self, live: Tensor, constant: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        # One channel of zeros behind the given ones is chosen for all others.
        self.padding = [0, 0] * (-dim - 1) + [0, 1]
        place = live.cumsum(0) - 1
        self.register_buffer("index", torch.where(live, place, live.sum()))
        self.constants = bool(constant.any())
        self.register_buffer("constant", constant.reshape(-1, *[1] * (-dim - 1)).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, live channels, …) to (…, C, …)."""
        y = nn.functional.pad(x, self.padding).index_select(self.dim, self.index)
        return y + self.constant if self.constants else y


class Chosen(nn.Module):
    """Chooses channels.

    Args:
        wanted: Which of all channels; shape (C,).
        dim: Dimension of the channels, counted from the end.
    """

    index: Tensor

    def __init__(self, wanted: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", wanted.nonzero().flatten())

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, C, …) to (…, wanted channels, …)."""
        return x.index_select(self.dim, self.index)


def _dim(layer: nn.Module) -> int:
    return 1 - layer.weight.dim() if isinstance(layer, CONVOLUTIONS) else -1


def _call(traced: fx.GraphModule, name: str, module: nn.Module) -> fx.Node:
    traced.add_submodule(name, module)
    return traced.graph.call_module(name)


def _keep_outputs(layer: Any, keep: Tensor) -> None:
    keep = keep.to(layer.weight.device)
    layer.weight = _like(layer.weight, layer.weight[keep])
    if layer.bias is not None:
        layer.bias = _like(layer.bias, layer.bias[keep])
    name = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
    setattr(layer, name, int(keep.sum()))


def _keep_inputs(layer: Any, keep: Tensor) -> None:
    layer.weight = _like(layer.weight, layer.weight[:, keep.to(layer.weight.device)])
    name = "in_features" if isinstance(layer, nn.Linear) else "in_channels"
    setattr(layer, name, int(keep.sum()))


def _keep_followed(layer: Any, keep: Tensor) -> None:
    """Keep channels of a batch norm or a depthwise convolution."""
    if isinstance(layer, CONVOLUTIONS):
        _keep_outputs(layer, keep)
        layer.groups = layer.in_channels = layer.out_channels
        return
    layer.num_features = int(keep.sum())
    for name in ("weight", "bias", "running_mean", "running_var"):
        values = getattr(layer, name)
        if values is not None:
            kept = values[keep.to(values.device)]
            parameter = isinstance(values, nn.Parameter)
            setattr(layer, name, _like(values, kept) if parameter else kept.contiguous())


def _like(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """Return a parameter with other values, of the same dtype, trained or not like the first."""
    values = values.detach().to(parameter.dtype).contiguous()
    return nn.Parameter(values, requires_grad=parameter.requires_grad)
