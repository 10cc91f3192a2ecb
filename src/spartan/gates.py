r"""Stochastic gates: hard-concrete in [0, 1] (L0 regularisation), Bernoulli in {0, 1}.

A hard-concrete gate z has one parameter, log α. With u uniform on (0, 1), temperature T and
stretch (γ, ζ),

    y = sigmoid((ln u - ln(1 - u) + log α) / T)
    s = y (ζ - γ) + γ
    z = min(1, max(0, s))

and with κ = -T ln(-γ / ζ)

    P(z ≠ 0) = sigmoid(log α + κ)          the gate is open
    median z = min(1, max(0, sigmoid(log α / T) (ζ - γ) + γ))

so that the median is 0 exactly where the gate is open with probability 1/2 or less.

A Bernoulli gate A has one logit g, and with L = ln u - ln(1 - u)

    A = 1[g + L > 0]                P(A = 1) = sigmoid(g)
    ∂A/∂g := ∂ sigmoid((g + L) / T) / ∂g        straight through

and without noise A = 1[g > 0]. Its value is exactly 0 or 1: `hard + soft - soft.detach()` rounds to
0.99999994 at times, and whoever compares that with 1 loses open gates.

Sources: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR
2018, section 2.2; the median as the gate at test time: Gallego-Posada et al., NeurIPS 2022,
appendix. Bernoulli gates: Maddison, Mnih, Teh, "The Concrete Distribution", ICLR 2017, with the
straight-through forward of Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax",
ICLR 2017.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# The stretch of the hard-concrete distribution: as published (Louizos et al., 2018, section 4).
GAMMA, ZETA = -0.1, 1.1
TEMPERATURE = 2 / 3
KAPPA = -TEMPERATURE * math.log(-GAMMA / ZETA)
# Keeps u and 1 - u away from 0, where their logarithms end.
_EPS = 1e-6


def open_probability(log_alpha: Tensor) -> Tensor:
    """Return P(z ≠ 0) of each gate."""
    return torch.sigmoid(log_alpha + KAPPA)


def log_alpha_at(probability: float) -> float:
    """Return the log α at which a gate is open with this probability, in (0, 1)."""
    return math.log(probability) - math.log1p(-probability) - KAPPA


def sample(log_alpha: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gates z at uniform numbers u, and dz / d log α.

    Args:
        log_alpha: Any shape, float32 or float64.
        u: Numbers in (0, 1), same shape.
    """
    y = torch.sigmoid((torch.logit(u) + log_alpha) / TEMPERATURE)
    stretched = y * (ZETA - GAMMA) + GAMMA
    slope = y * (1 - y) * ((ZETA - GAMMA) / TEMPERATURE)
    inside = (stretched > 0) & (stretched < 1)
    return stretched.clamp(0.0, 1.0), torch.where(inside, slope, 0.0)


def draw(log_alpha: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random gates z, and dz / d log α."""
    u = torch.rand(
        log_alpha.shape, dtype=log_alpha.dtype, device=log_alpha.device, generator=generator
    )
    return sample(log_alpha, u.mul_(1 - 2 * _EPS).add_(_EPS))


def median(log_alpha: Tensor) -> Tensor:
    """Return the median of each gate."""
    y = torch.sigmoid(log_alpha / TEMPERATURE)
    return (y * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def open_median(log_alpha: Tensor) -> Tensor:
    """Return the median of each gate given that it is open: never 0."""
    # The quantile 1 - P / 2, above which half of P = P(z ≠ 0) lies.
    y = torch.sigmoid((torch.log(2 / open_probability(log_alpha) - 1) + log_alpha) / TEMPERATURE)
    return (y * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)


def logistic_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return L = ln u - ln(1 - u) of the shape, dtype and device of a tensor of logits."""
    # In float32 also where the logits are narrower: their u would be 0 or 1 too often.
    u = torch.rand(like.shape, device=like.device, generator=generator)
    return torch.logit(u.mul_(1 - 2 * _EPS).add_(_EPS)).to(like.dtype)


def bernoulli(logits: Tensor, noise: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Return Bernoulli gates, exactly 0 or 1, with their straight-through gradient.

    Args:
        logits: g, any shape and floating dtype.
        noise: L, same shape; without it, gates are open where their probability is above 1/2.
        temperature: T, of the gradient only.
    """
    noisy = logits if noise is None else logits + noise
    gates: Tensor = _StraightThrough.apply(noisy, temperature)  # type: ignore[no-untyped-call]
    return gates


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, noisy: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(noisy)
        ctx.temperature = temperature
        return (noisy > 0).to(noisy.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (noisy,) = ctx.saved_tensors
        soft = torch.sigmoid(noisy / ctx.temperature)
        return grad * soft * (1 - soft) / ctx.temperature, None
