"""Prunes and grows a layer's connections; survivors keep values and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from spartan.kernels.connections import Connections
from spartan.kernels.key_lists import is_in, merge
from spartan.methods.growth.contract import GrowingLayer


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
    for optimizer in optimizers:
        state = optimizer.state.get(old, {})
        for name, entries in state.items():
            if isinstance(entries, Tensor) and entries.shape == shape:
                state[name] = carried(entries)
    old.grad = None
    module.rewire(Connections.from_keys(keys, *module.matrix_shape), values)
    module.values.grad = gradient
    _remember(layer, move.grown)


def _remember(layer: GrowingLayer, keys: Tensor) -> None:
    """Add the pairs that were never connected before."""
    new = keys[~is_in(keys, layer.tried)]
    if not new.numel():
        return
    tried, places = merge(layer.tried, new)
    rounds = torch.zeros_like(tried, dtype=layer.rounds.dtype)
    rounds[places] = layer.rounds
    layer.tried, layer.rounds = tried, rounds
