r"""Guided stochastic exploration, GSE (Heddes et al., 2024).

With h the inputs of a layer and δ the gradients of its outputs, A its connections, N = |A|:

    S ← ⌈γ N⌉ pairs (b, a) with b ~ g, a ~ f, without duplicates and without A
    G ← the k pairs of S with the largest |∇_ba|,    ∇_ba = Σ_i δ_bi h_ai

No gradient outside S is formed, so an update costs as much as a few training steps. The endpoints
of a pair are drawn independently, up to normalisation from

    uniform     f_a = 1                   g_b = 1
    grabo       f_a = Σ_i |h_ai|          g_b = Σ_i |δ_bi|           f gᵀ bounds |∇|
    graest      f_a = |Σ_i s_i h_ai|      g_b = |Σ_i s_i δ_bi|       s_i = ±1 at random

A layer of which half or more is connected is not sampled: all other pairs are candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from spartan.always_sparse.random_graphs import nth_outside, rising
from spartan.errors import MethodError, did_you_mean
from spartan.kernels.key_lists import is_in
from spartan.methods.growth.contract import (
    AnnealedGrowth,
    GrowingLayer,
    averaged,
    largest,
    processes,
    untied,
)

Sampler = Literal["uniform", "grabo", "graest"]


@dataclass(frozen=True)
class GSE(AnnealedGrowth):
    """Grow the connections of largest gradient among a random subset.

    Attributes:
        fraction: α, share of the connections that an update at the very beginning would replace.
        period: T, steps between two updates; the paper takes 1,000 of 78,000.
        end: T_end, as a fraction of the run.
        seed: Of all random choices.
        sampler: How pairs are drawn: `"uniform"`, which the paper recommends, `"grabo"` or
            `"graest"`.
        gamma: γ, size of the subset relative to the number of connections.

    Raises:
        MethodError: A setting is out of range.

    Source: Heddes, Srinivasa, Givargis, Nicolau, "Always-Sparse Training by Growing Connections
    with Guided Stochastic Exploration", arXiv 2401.06898, 2024.
    """

    fraction: float = 0.2
    end: float = 0.6
    sampler: Sampler = "uniform"
    gamma: float = 1.0

    name: ClassVar[str] = "gse"
    summary: ClassVar[str] = "always-sparse layers; the default, and the one for very wide layers"
    paper: ClassVar[str] = "Heddes et al., 2024"
    step_cost: ClassVar[str] = "nothing; a few steps' time at each update"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler not in get_args(Sampler):
            hint = did_you_mean(str(self.sampler), get_args(Sampler))
            raise MethodError(f"Unknown sampler {self.sampler!r}; {hint}")
        if not 0 < self.gamma < math.inf:
            raise MethodError(f"gamma={self.gamma!r} must be positive.")

    def grow(self, layers: Sequence[GrowingLayer], count: int, step: int) -> list[Tensor]:
        subsets = [self.sample(layer, step) for layer in layers]
        magnitudes = [
            untied(layer.gradient(keys).abs(), layer.generator(self.seed, step, "/ties"))
            for layer, keys in zip(layers, subsets, strict=True)
        ]
        chosen = largest(magnitudes, count)
        return [keys[mask] for keys, mask in zip(subsets, chosen, strict=True)]

    def sample(self, layer: GrowingLayer, step: int) -> Tensor:
        """Draw S: keys of unconnected pairs, rising."""
        outputs, inputs = layer.module.matrix_shape
        connected = layer.connections.keys()
        if 2 * connected.numel() >= outputs * inputs:
            ranks = torch.arange(layer.unconnected, device=connected.device)
            return nth_outside(connected, ranks)
        draws = math.ceil(self.gamma * connected.numel())
        f, g = self.distributions(layer, step)
        generator = layer.generator(self.seed, step)
        a = _draw(f, inputs, draws, generator).to(connected.device)
        b = _draw(g, outputs, draws, generator).to(connected.device)
        subset = rising(b * inputs + a)
        return subset[~is_in(subset, connected)]

    def distributions(self, layer: GrowingLayer, step: int) -> tuple[Tensor | None, Tensor | None]:
        """Return f of the inputs and g of the outputs, not normalised; None for uniform."""
        if self.sampler == "uniform":
            return None, None
        if self.sampler == "grabo":
            f = sum(h.abs().sum((0, 2), dtype=torch.float64) for h, _ in layer.passes)
            g = sum(delta.abs().sum((0, 2), dtype=torch.float64) for _, delta in layer.passes)
            assert isinstance(f, Tensor)
            assert isinstance(g, Tensor)
            return averaged(f).cpu(), averaged(g).cpu()
        # Every process has samples, and so signs, of its own.
        rank = torch.distributed.get_rank() if processes() > 1 else 0
        generator = layer.generator(self.seed, step, f"/signs/{rank}")
        f, g = torch.zeros(()), torch.zeros(())
        for h, delta in layer.passes:
            shape = (h.shape[0], 1, h.shape[2])
            signs = torch.randint(2, shape, generator=generator, device="cpu").to(h) * 2 - 1
            f = f.to(h.device) + (signs * h).sum((0, 2), dtype=torch.float64)
            g = g.to(h.device) + (signs * delta).sum((0, 2), dtype=torch.float64)
        return averaged(f).abs().cpu(), averaged(g).abs().cpu()


def _draw(weights: Tensor | None, size: int, draws: int, generator: torch.Generator) -> Tensor:
    """Draw indices with replacement; uniformly where all weights are zero."""
    if weights is None or not bool(weights.any()):
        return torch.randint(size, (draws,), generator=generator, device="cpu")
    # Not torch.multinomial, which ends at 2^24 categories.
    below = weights.cumsum(0)
    points = torch.rand(draws, dtype=torch.float64, generator=generator, device="cpu")
    return torch.searchsorted(below, points * below[-1], right=True).clamp_(max=size - 1)
