r"""Hard-concrete gates: random numbers in [0, 1] that are exactly 0 or 1 with some probability.

A gate z has one parameter, log α. With u uniform on (0, 1), temperature T and stretch (γ, ζ),

    y = sigmoid((ln u - ln(1 - u) + log α) / T)
    s = y (ζ - γ) + γ
    z = min(1, max(0, s))

and with κ = -T ln(-γ / ζ)

    P(z ≠ 0) = sigmoid(log α + κ)          the gate is open
    median z = min(1, max(0, sigmoid(log α / T) (ζ - γ) + γ))

so that the median is 0 exactly where the gate is open with probability 1/2 or less.

Source: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR
2018, section 2.2; the median as the gate at test time: Gallego-Posada et al., NeurIPS 2022,
appendix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
