"""Sparse evolutionary training, SET (Mocanu et al., 2018).

Connections of smallest magnitude give way to random ones. As in the comparison of RigL (Evci et
al., 2020), and unlike the first code, values are compared whatever their sign, new ones begin at
zero, and the share that is replaced falls along a cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spartan.always_sparse.random_graphs import distinct, nth_outside
from spartan.methods.growth.contract import AnnealedGrowth, GrowingLayer


@dataclass(frozen=True)
class SET(AnnealedGrowth):
    """Grow connections at random.

    Every pair that is not connected is as likely, in whichever layer that shares the budget.

    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
    connectivity inspired by network science", Nature Communications 2018.
    """

    uses_gradients: ClassVar[bool] = False
    name: ClassVar[str] = "set"
    summary: ClassVar[str] = "always-sparse layers; random growth, the cheapest that explores"
    paper: ClassVar[str] = "Mocanu et al., 2018"
    step_cost: ClassVar[str] = "nothing; a few steps' time at each update"

    def grow(self, layers: Sequence[GrowingLayer], count: int, step: int) -> list[Tensor]:
        free = [layer.unconnected for layer in layers]
        generator = layers[0].generator(self.seed, step)
        ranks = distinct(min(count, sum(free)), sum(free), generator)
        starts = torch.tensor([0, *free]).cumsum(0)
        places = torch.searchsorted(ranks, starts).tolist()
        grown = []
        for i, layer in enumerate(layers):
            own = (ranks[places[i] : places[i + 1]] - starts[i]).to(layer.tried.device)
            grown.append(nth_outside(layer.connections.keys(), own))
        return grown
