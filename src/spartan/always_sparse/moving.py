"""Moving connections, with everything that is kept for each of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from spartan.always_sparse.growth import SparseSite
from spartan.kernels.connections import Connections
from spartan.kernels.key_lists import is_in, merge


@dataclass(frozen=True)
class Move:
    """What an update does to one layer.

    Attributes:
        site: The layer.
        kept: Which of its connections survive, in their order.
        grown: Keys of new ones: int64, rising, not connected now.
    """

    site: SparseSite
    kept: Tensor
    grown: Tensor


def apply(move: Move, optimizers: Iterable[Optimizer], count_rounds: bool) -> None:
    """Prune and grow.

    Values, gradient and whatever an optimizer keeps for each weight follow the connections that
    survive; for new ones they are zero.

    Args:
        move: What to do.
        optimizers: Those that may keep something for the layer's values.
        count_rounds: Whether `site.rounds` are counted.
    """
    site, layer = move.site, move.site.layer
    before = site.connections.keys()
    if count_rounds:
        _remember(site, before)
        site.rounds[torch.searchsorted(site.tried, before)] += 1
    keys, places = merge(before[move.kept], move.grown)
    old = layer.values

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
    layer.rewire(Connections.from_keys(keys, *layer.matrix_shape), values)
    layer.values.grad = gradient
    _remember(site, move.grown)


def _remember(site: SparseSite, keys: Tensor) -> None:
    """Add the pairs that were never connected before."""
    new = keys[~is_in(keys, site.tried)]
    if not new.numel():
        return
    tried, places = merge(site.tried, new)
    rounds = torch.zeros_like(tried, dtype=site.rounds.dtype)
    rounds[places] = site.rounds
    site.tried, site.rounds = tried, rounds
