"""Prunes and grows a layer's connections; survivors keep values and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from spartan.errors import MethodError
from spartan.kernels.connections import Connections
from spartan.kernels.key_lists import is_in, merge
from spartan.methods.growth.contract import GrowingLayer
from spartan.sparsifier.optimizers import nested


@dataclass(frozen=True)
class Move:
    """What an update does to one layer.

    Attributes:
        layer: The layer.
        kept: Which of its connections survive, in their order.
        grown: Keys of new ones: int64, rising, not connected now.
    """

    layer: GrowingLayer
    kept: Tensor
    grown: Tensor


def apply(move: Move, optimizers: Iterable[Optimizer], count_rounds: bool) -> None:
    """Prune and grow.

    Values, gradient and whatever an optimizer keeps for each weight follow the connections that
    survive; for new ones they are zero.

    Args:
        move: What to do.
        optimizers: Those that may keep something for the layer's values.
        count_rounds: Whether `layer.rounds` are counted.
    """
    layer, module = move.layer, move.layer.module
    before = layer.connections.keys()
    if count_rounds:
        _remember(layer, before)
        layer.rounds[torch.searchsorted(layer.tried, before)] += 1
    keys, places = merge(before[move.kept], move.grown)
    old = module.values

    def carried(entries: Tensor) -> Tensor:
        new = entries.new_zeros(keys.numel())
        new[places] = entries[move.kept]
        return new

    shape = old.shape
    values = carried(old.detach())
    gradient = None if old.grad is None else carried(old.grad)
    for optimizer in nested(*optimizers):
        state = optimizer.state.get(old, {})
        for name, entries in state.items():
            if isinstance(entries, Tensor) and entries.shape == shape:
                state[name] = carried(entries)
    old.grad = None
    module.rewire(Connections.from_keys(keys, *module.matrix_shape), values)
    module.values.grad = gradient
    layer.known = layer.connections
    _remember(layer, move.grown)


def check_carried(layer: GrowingLayer, optimizers: Iterable[Optimizer]) -> None:
    """Raise `MethodError` unless all that optimizers keep for a layer can follow its connections.

    That is: floating-point tensors with one entry for each connection, and single numbers. Other
    things (quantised, sharded or factored states, histories) would come to belong to other
    connections.
    """
    values = layer.module.values
    for optimizer in nested(*optimizers):
        kept = {
            f"state[{name!r}]": entries for name, entries in optimizer.state.get(values, {}).items()
        }
        # What it keeps elsewhere: in attributes, and in its state under other keys.
        known = {"state", "param_groups", "defaults"}
        elsewhere = {k: v for k, v in vars(optimizer).items() if k not in known}
        elsewhere |= {repr(k): v for k, v in optimizer.state.items() if not isinstance(k, Tensor)}
        total = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        own = [name for name, value in elsewhere.items() if _holds_some(value, values, total)]
        wrong = [name for name, entries in kept.items() if not _follows(entries, values)]
        for name in [*wrong, *own]:
            raise MethodError(
                f"{type(optimizer).__name__} keeps {name} for {layer.name!r}, which is not one "
                "floating-point number for each connection, in its state: it cannot follow "
                "connections that move. Use an optimizer of torch.optim, such as SGD or Adam."
            )


def _follows(entries: object, values: Tensor) -> bool:
    if isinstance(entries, Tensor):
        plain = type(entries) is Tensor and entries.is_floating_point()
        return entries.numel() <= 1 or (plain and entries.shape == values.shape)
    return entries is None or isinstance(entries, bool | int | float | str)


def _holds_some(value: object, values: Tensor, total: int, depth: int = 3) -> bool:
    """Whether something holds tensors of as many entries as a layer, or all layers, have values."""
    if isinstance(value, Tensor):
        same = value is values or value is values.grad
        return not same and values.numel() > 1 and value.numel() in (values.numel(), total)
    inner = list(value.values()) if isinstance(value, dict) else value
    if depth and isinstance(inner, list | tuple):
        return any(_holds_some(one, values, total, depth - 1) for one in inner)
    return False


def _remember(layer: GrowingLayer, keys: Tensor) -> None:
    """Add the pairs that were never connected before."""
    new = keys[~is_in(keys, layer.tried)]
    if not new.numel():
        return
    tried, places = merge(layer.tried, new)
    rounds = torch.zeros_like(tried, dtype=layer.rounds.dtype)
    rounds[places] = layer.rounds
    layer.tried, layer.rounds = tried, rounds
