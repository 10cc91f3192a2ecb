r"""The contract of methods that grow and prune the connections of always-sparse layers.

After some optimizer steps, the budget being N connections of a layer, or of all layers together:

    k = min(⌈α_t N⌉, candidates)
    G = k unconnected pairs, which the method chooses
    P = the k connections of smallest |θ|
    A ← (A \ P) ∪ G, the grown ones at value 0

G and P are chosen on the same A: what was just pruned is not grown, and what was just grown is not
pruned. Gradients are those of the step just done.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spartan.always_sparse.layer import SparseLayer
from spartan.errors import MethodError
from spartan.kernels import ScanRequest, Scores, connected, masks_of, scan
from spartan.kernels.connections import Connections
from spartan.kernels.scores import wide
from spartan.registry import Registered
from spartan.schedules import check_fraction
from spartan.seeds import derive_seed
from spartan.weights.prunable import Prunable

# Ties among zero gradients get scores of at most this, drawn at random: it lies above the smallest
# normal float32 (1.2e-38), with room for the random factor. Gradients below it count as zero.
TINY = 1e-37


@dataclass(frozen=True, eq=False)
class ConnectionValues(Prunable):
    """The values of an always-sparse layer, as a weight that a budget speaks of.

    Attributes:
        full_shape: Shape of the weight, were it dense.
    """

    full_shape: tuple[int, ...] = ()

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.full_shape)


@dataclass(eq=False)
class GrowingLayer:
    """One always-sparse layer during a run.

    Attributes:
        prunable: Its values.
        module: The layer itself.
        tried: Every pair that was ever connected, as keys output * inputs + input: int64, rising.
        rounds: For each of `tried`, how many updates found it connected; zeros where the method
            does not count them.
        known: The graph that the run has last seen.
    """

    prunable: ConnectionValues
    module: SparseLayer
    tried: Tensor
    rounds: Tensor
    known: Connections

    @property
    def name(self) -> str:
        """Name of the values."""
        return self.prunable.name

    @property
    def connections(self) -> Connections:
        """The graph."""
        return self.module.connections

    @property
    def unconnected(self) -> int:
        """Number of pairs that are not connected."""
        return self.connections.pairs - self.connections.count

    @property
    def passes(self) -> list[tuple[Tensor, Tensor]]:
        """Inputs and output gradients of the step: (panels, features, samples) each.

        Raises:
            StateError: An input was overwritten since.
        """
        return self.module.passes.checked(self.name) if self.module.passes is not None else []

    @property
    def exchanged(self) -> bool:
        """Whether something else than the run has given the layer another graph."""
        now = self.connections
        if now is self.known:
            return False
        if now.count == self.known.count and torch.equal(now.keys(), self.known.keys()):
            self.known = now
            return False
        return True

    def gradient(self, keys: Tensor) -> Tensor:
        """Return the weight gradient at pairs, averaged over processes: float32 or float64."""
        connections = Connections.from_keys(keys, *self.module.matrix_shape)
        parts = [connected.at_pairs(connections, wide(x), wide(dy)) for x, dy in self.passes]
        return averaged(torch.stack(parts).sum(0))

    def generator(self, seed: int, step: int, salt: str = "") -> torch.Generator:
        """Return the generator of an update: the same in every process, another in each layer."""
        derived = derive_seed(seed, f"grow/{self.name}{salt}", step)
        return torch.Generator().manual_seed(derived)


def density_of(layers: Sequence[GrowingLayer]) -> float:
    """Return the connections of layers as a fraction of their pairs."""
    return sum(s.connections.count for s in layers) / sum(s.prunable.numel for s in layers)


class GrowthMethod(Registered, ABC):
    """Base of the growth methods."""

    moves: ClassVar[bool] = True  # whether connections move at all
    uses_gradients: ClassVar[bool] = True  # whether it looks at activations and gradients
    counts_rounds: ClassVar[bool] = False  # whether it looks at `GrowingLayer.rounds`

    @abstractmethod
    def fraction_at(self, step: int, total_steps: int) -> float:
        """Return α, the share of the connections to replace after `step`; 0 for no update."""

    @abstractmethod
    def grow(self, layers: Sequence[GrowingLayer], count: int, step: int) -> list[Tensor]:
        """Choose at most `count` unconnected pairs of all layers together.

        Args:
            layers: Layers that share a budget.
            count: How many pairs.
            step: Steps done.

        Returns:
            For each layer keys output * inputs + input: int64, rising.
        """


@dataclass(frozen=True)
class AnnealedGrowth(GrowthMethod):
    """Growth every few steps, by a share that falls along a cosine.

    α_t = α / 2 (1 + cos(π t / T_end)), and 0 from T_end on.

    Attributes:
        fraction: α, share of the connections that an update at the very beginning would replace.
        period: T, steps between two updates.
        end: T_end, as a fraction of the run.
        seed: Of all random choices.

    Raises:
        MethodError: A setting is out of range.
    """

    fraction: float = 0.3
    period: int = 100
    end: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise MethodError(f"fraction={self.fraction!r} must lie in (0, 1].")
        if not (isinstance(self.period, int) and self.period >= 1):
            raise MethodError(f"period={self.period!r} must be a number of steps, at least 1.")
        check_fraction("end", self.end)

    def fraction_at(self, step: int, total_steps: int) -> float:
        t, end = step - 1, int(self.end * total_steps)
        if step % self.period or t < 0 or t >= end:
            return 0.0
        return self.fraction / 2 * (1 + math.cos(math.pi * t / end))


def largest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Mark the `count` largest scores of several tensors together, ties by position.

    Args:
        scores: 1-D, not negative, finite.
        count: How many.

    Returns:
        Boolean tensors of the same shapes.
    """
    kept = Scores(list(scores), [1.0] * len(scores), [1.0] * len(scores), absolute=True)
    return masks_of(kept, scan([ScanRequest(kept, float(count))])[0].cutoff)


def untied(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Return scores without zeros, which are put into a random order below all others.

    Where units are dead, many gradients are zero, and the order in memory must not choose.
    """
    zero = scores == 0
    if not bool(zero.any()):
        return scores
    draws = torch.rand(scores.shape, generator=generator, device="cpu").to(scores)
    return torch.where(zero, TINY * draws, scores)


def averaged(x: Tensor) -> Tensor:
    """Return the mean of x over the processes of a run; x itself where there is one."""
    if processes() > 1:
        torch.distributed.all_reduce(x)
        x /= processes()
    return x


def processes() -> int:
    """Return the number of processes of the run."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()
