r"""Dynamic sparse training with exploration and exploitation, DST-EE (Huang et al., 2023).

    N_ba ← N_ba + 1 for each connection there was when an update comes
    S_ba = |∇_ba| + c m ln(t) / (N_ba + ε)
    G ← the k unconnected pairs with the largest S_ba

The bonus draws growth to pairs that were rarely connected; c = 0 is RigL. As c has the unit of a
gradient, it is given here in units of m, the mean |∇| of the unconnected pairs of the layer. N is
kept for pairs that ever were connected only: it is 0 for all others. Counted before pruning, it
also knows of the connections that the next update takes away again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spartan.errors import MethodError
from spartan.methods.growth.contract import AnnealedGrowth, GrowingLayer
from spartan.methods.growth.rigl import Best, Slice, dense_gradient


@dataclass(frozen=True)
class DSTEE(AnnealedGrowth):
    """Grow the connections of largest gradient, with a bonus for those rarely tried.

    Attributes:
        fraction: α, share of the connections that an update at the very beginning would replace.
        period: T, steps between two updates.
        end: T_end, as a fraction of the run.
        seed: Of all random choices.
        exploration: c, in units of the mean |∇|. The paper's value could not be confirmed.
        epsilon: ε.

    Raises:
        MethodError: A setting is out of range.

    Source: Huang et al., "Dynamic Sparse Training via Balancing the Exploration-Exploitation
    Trade-off", DAC 2023.
    """

    exploration: float = 1.0
    epsilon: float = 1.0

    counts_rounds: ClassVar[bool] = True
    name: ClassVar[str] = "dst-ee"
    summary: ClassVar[str] = "always-sparse layers; RigL with a bonus for what was rarely tried"
    paper: ClassVar[str] = "Huang et al., DAC 2023"
    step_cost: ClassVar[str] = "nothing; a dense gradient, in slices, twice at each update"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.exploration < math.inf:
            raise MethodError(f"exploration={self.exploration!r} must be 0 or positive.")
        if not 0 < self.epsilon < math.inf:
            raise MethodError(f"epsilon={self.epsilon!r} must be positive.")

    def grow(self, layers: Sequence[GrowingLayer], count: int, step: int) -> list[Tensor]:
        best = Best(layers, count, self.seed, step)
        for i, layer in enumerate(layers):
            total = 0.0
            for part in dense_gradient(layer):
                part.magnitudes[part.connected] = 0.0
                total += float(part.magnitudes.sum(dtype=torch.float64))
            mean = total / max(1, layer.unconnected)
            generator = layer.generator(self.seed, step, "/bonus")
            for part in dense_gradient(layer):
                # Pairs of equal bonus and no gradient differ by this only.
                draws = torch.rand(part.magnitudes.shape, generator=generator, device="cpu")
                gradient = part.magnitudes.double() + 1e-9 * mean * draws.to(part.magnitudes)
                c, rounds = self.exploration * mean, _rounds(layer, part)
                best.offer(i, part, acquisition(gradient, rounds, step, c, self.epsilon))
        return best.keys


def acquisition(gradient: Tensor, rounds: Tensor, step: int, c: float, epsilon: float) -> Tensor:
    """Return S, in float64: a large bonus would round small gradients away."""
    return gradient.double().abs() + c * math.log(max(step, 1)) / (rounds.double() + epsilon)


def _rounds(layer: GrowingLayer, part: Slice) -> Tensor:
    """Return N of the pairs of a slice."""
    rounds = torch.zeros_like(part.magnitudes, dtype=layer.rounds.dtype)
    ends = (part.first, part.first + part.magnitudes.numel())
    low, high = (int(torch.searchsorted(layer.tried, end)) for end in ends)
    rounds[layer.tried[low:high] - part.first] = layer.rounds[low:high]
    return rounds
