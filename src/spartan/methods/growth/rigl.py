"""RigL, the rigged lottery: grow connections of largest gradient (Evci et al., ICML 2020).

    G ← the k unconnected pairs with the largest |∇_ba|

The gradient of the whole dense weight is needed, and is formed a few rows at a time. What was just
pruned is not a candidate, as in the comparison of Heddes et al. (2024); the first code lets it grow
again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spartan.kernels.scores import wide
from spartan.methods.growth.contract import (
    TINY,
    AnnealedGrowth,
    GrowingLayer,
    averaged,
    largest,
    untied,
)

_SLICE = 1 << 21  # entries of the dense gradient at a time, 8 MiB: it is never formed as a whole


@dataclass(frozen=True)
class RigL(AnnealedGrowth):
    """Grow the connections of largest gradient.

    Source: Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners",
    ICML 2020.
    """

    name: ClassVar[str] = "rigl"
    summary: ClassVar[str] = "always-sparse layers; greedy growth by the exact gradient"
    paper: ClassVar[str] = "Evci et al., ICML 2020"
    step_cost: ClassVar[str] = "nothing; a dense gradient, in slices, at each update"

    def grow(self, layers: Sequence[GrowingLayer], count: int, step: int) -> list[Tensor]:
        best = Best(layers, count, self.seed, step)
        for i, layer in enumerate(layers):
            for part in dense_gradient(layer):
                best.offer(i, part, part.magnitudes)
        return best.keys


@dataclass(frozen=True)
class Slice:
    """Some rows of a dense gradient.

    Attributes:
        first: Key of the first entry.
        magnitudes: |∇|, flat.
        connected: Which entries are connected.
    """

    first: int
    magnitudes: Tensor
    connected: Tensor


def dense_gradient(layer: GrowingLayer) -> Iterator[Slice]:
    """Form the gradient of the dense weight, averaged over processes, a few rows at a time."""
    outputs, inputs = layer.module.matrix_shape
    rows = max(1, _SLICE // inputs)
    starts, keys = layer.connections.starts, layer.connections.keys()
    flat = [[wide(x).transpose(0, 1).flatten(1) for x in part] for part in layer.passes]
    for begin in range(0, outputs, rows):
        end = min(outputs, begin + rows)
        gradient = sum(delta[begin:end] @ h.t() for h, delta in flat)
        assert isinstance(gradient, Tensor)
        connected = keys[int(starts[begin]) : int(starts[end])] - begin * inputs
        yield Slice(begin * inputs, averaged(gradient).abs_().flatten(), connected)


class Best:
    """The unconnected pairs of highest score among those offered so far.

    Args:
        layers: The layers they are of.
        count: How many pairs to keep of all layers together.
        seed: Decides among equal scores.
        step: So does the step.
    """

    def __init__(self, layers: Sequence[GrowingLayer], count: int, seed: int, step: int) -> None:
        self.count = count
        self._generators = [layer.generator(seed, step, "/ties") for layer in layers]
        self.keys = [layer.tried[:0] for layer in layers]
        self._scores: dict[int, Tensor] = {}
        self._floor = 0.0  # what scores less is of no interest

    def offer(self, layer: int, part: Slice, scores: Tensor) -> None:
        """Offer the pairs of a slice, which comes after those offered before.

        Args:
            layer: Index of the layer.
            part: The slice.
            scores: Not negative; overwritten.
        """
        scores[part.connected] = -1.0
        places = (scores >= self._floor).nonzero()[:, 0]
        found = untied(scores[places], self._generators[layer])
        self.keys[layer] = torch.cat((self.keys[layer], places + part.first))
        self._scores[layer] = torch.cat((self._scores.get(layer, found[:0]), found))
        if sum(kept.numel() for kept in self._scores.values()) <= self.count:
            return
        for i, mask in zip(
            self._scores, largest([*self._scores.values()], self.count), strict=True
        ):
            self.keys[i], self._scores[i] = self.keys[i][mask], self._scores[i][mask]
        lowest = min(float(s.min()) for s in self._scores.values() if s.numel())
        self._floor = lowest if lowest > TINY else 0.0
