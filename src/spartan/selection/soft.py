r"""Soft top-k: regularised optimal transport with one dual variable.

Entries with value v_i, cost c_i and unit value u_i = v_i / c_i share a budget k. The mask solves

    maximise_m  sum_i v_i m_i + (1/beta) sum_i c_i h(m_i)   subject to  sum_i c_i m_i = k,

with h the binary entropy (Tai et al. 2022, the transport problem behind soft top-k masking). Its
solution is m_i = sigmoid(beta u_i + mu), where mu is the only root of sum_i c_i m_i = k. With
s_i = m_i (1 - m_i), an upstream gradient g comes back, by implicit differentiation, as

    dL/dv_j = beta s_j (g_j / c_j - price),    price = sum_i g_i s_i / sum_i c_i s_i.

Numerically, everything is centred at a `reference` score near the threshold: x_i = beta (u_i -
reference) + mu. The entries that carry the mass then have a small x, so float32 is enough even
where beta * u is in the millions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spartan.errors import BudgetError
from spartan.selection.hard import check_request, threshold_of, unit_values

_MAX_PASSES = 200
# Entries a CPU core handles while their temporaries stay in its cache.
_CHUNK = 1 << 17


@dataclass(frozen=True)
class Dual:
    """The solved dual variable: m_i = sigmoid(beta (u_i - reference) + mu).

    Attributes:
        beta: Sharpness, per unit of u.
        reference: Score at which x = mu.
        mu: The dual variable; +inf keeps everything, -inf nothing.
        passes: Passes over the scores that the solver took.
    """

    beta: float
    reference: float
    mu: float
    passes: int = 0

    @property
    def threshold(self) -> float:
        """The soft threshold: the score at which the mask is one half."""
        return self.reference - self.mu / self.beta

    def logits(self, scores: Tensor) -> Tensor:
        """Return x = beta (u - reference) + mu, in the dtype of the scores."""
        if math.isinf(self.mu):
            return torch.full_like(scores, self.mu)
        return (scores - self.reference).mul_(self.beta).add_(self.mu)

    def mask(self, scores: Tensor) -> Tensor:
        """Return the soft mask of `scores`."""
        return self.logits(scores).sigmoid_()


def soft_topk(values: Tensor, budget: float, costs: Tensor | None = None, *, beta: float) -> Tensor:
    """Differentiable top-k: a mask in [0, 1] whose cost is the budget.

    For small beta every entry gets budget / total cost; for large beta the mask approaches the
    hard top-k of values / costs (fractional at the boundary, ties sharing equally).

    Args:
        values: Any shape; float64, float32, float16 or bfloat16.
        budget: Cost to keep, between 0 and the total cost.
        costs: Positive cost of each entry, same shape; None means 1 each.
        beta: Sharpness, in units of 1 / (values / costs); positive.

    Returns:
        The mask, in float64 for float64 values and float32 for all others. Its cost meets the
        budget to a relative error of 1e-6 in float64 and 1e-4 in float32. Gradients flow to
        `values` only.

    Raises:
        BudgetError: The budget, beta or a cost is out of range, or a value is not finite.

    Source: Tai, Tian, Lim, "Spartan: Differentiable Sparsity via Regularized Transportation",
    NeurIPS 2022.
    """
    check_request(values, budget, costs)
    if not (math.isfinite(beta) and beta > 0):
        raise BudgetError(f"beta={beta} must be positive and finite.")
    mask: Tensor = _SoftTopK.apply(values, float(budget), costs, float(beta))  # type: ignore[no-untyped-call]
    return mask


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, budget: float, costs: Tensor | None, beta: float
    ) -> Tensor:
        scores = unit_values(values, costs)
        cost = 1.0 if costs is None else costs.to(scores.dtype)
        reference = threshold_of([scores], [cost], budget)
        dual = solve([scores], [cost], budget, beta, reference)
        logits = dual.logits(scores)
        ctx.save_for_backward(logits, costs)
        ctx.beta, ctx.dtype = beta, values.dtype
        return logits.sigmoid()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, costs = ctx.saved_tensors
        spread = logits.sigmoid() * (-logits).sigmoid()
        cost = 1.0 if costs is None else costs.to(spread.dtype)
        grad = pull_back([spread], [upstream], [cost], ctx.beta)[0]
        return grad.to(ctx.dtype), None, None, None


def solve(
    scores: Sequence[Tensor],
    costs: Sequence[float | Tensor],
    budget: float,
    beta: float,
    reference: float,
    start: float = 0.0,
) -> Dual:
    """Find the dual variable by a bracketed Newton method on the logarithm of the mass.

    Newton works on the smaller of the kept and the dropped mass, whose logarithm is close to
    linear in mu; where a step would leave the bracket, bisection takes over, so the method cannot
    fail to converge.

    Args:
        scores: Unit values u, float32 or float64, finite; several tensors share one dual.
        costs: For each tensor the cost of an entry: one number, or a tensor of its shape.
        budget: Mass to keep.
        beta: Sharpness, positive.
        reference: Score to centre at; the hard threshold is a good one.
        start: First guess for mu.
    """
    total = sum(
        float(c.sum(dtype=torch.float64)) if isinstance(c, Tensor) else c * s.numel()
        for s, c in zip(scores, costs, strict=True)
    )
    if budget >= total or budget <= 0:
        return Dual(beta, 0.0, math.copysign(math.inf, budget - total / 2))
    if math.isinf(reference):
        reference = 0.0
    keep_side = 2 * budget <= total
    goal = budget if keep_side else total - budget
    sign = 1.0 if keep_side else -1.0
    double = scores[0].dtype == torch.float64
    tolerance, resolution = (1e-13, 4e-16) if double else (2e-6, 1e-7)

    low, high = _bracket(scores, budget, total, beta, reference)
    mu = min(max(start, low), high)
    passes = 0
    for passes in range(1, _MAX_PASSES + 1):  # noqa: B007 - reported below
        mass, slope = _mass(scores, costs, beta, reference, mu, sign)
        if abs(mass - goal) <= tolerance * goal:
            break
        if (mass > goal) == keep_side:
            high = mu
        else:
            low = mu
        newton = mu
        if mass > 0 and slope > 0:
            newton = mu - sign * math.log(mass / goal) * mass / slope
        if abs(newton - mu) <= resolution * max(1.0, abs(mu)) and newton != mu:
            break
        mu = newton if low < newton < high else 0.5 * (low + high)
        if high - low <= resolution * max(1.0, abs(mu)):
            break
    return Dual(beta, reference, mu, passes)


def pull_back(
    spread: Sequence[Tensor],
    upstream: Sequence[Tensor],
    costs: Sequence[float | Tensor],
    beta: float,
) -> list[Tensor]:
    """Return dL/dv from dL/dm = `upstream`, with `spread` = m (1 - m); zero for a saturated mask.

    All tensors together are one group, coupled through the price of the budget.
    """
    zero = torch.zeros((), dtype=torch.float64, device=spread[0].device)
    earned, weight = zero, zero
    for s, g, c in zip(spread, upstream, costs, strict=True):
        earned = earned + (g * s).sum(dtype=torch.float64)
        weight = weight + (s * c).sum(dtype=torch.float64)
    price = earned / weight
    price = torch.where(torch.isfinite(price), price, 0.0)
    return [
        (g / c - price.to(s.dtype)).mul_(s).mul_(beta)
        for s, g, c in zip(spread, upstream, costs, strict=True)
    ]


def soft_rows(scores: Tensor, kept: float, beta: float, threshold: Tensor) -> Tensor:
    """Return the soft top-k mask of each row: every row is a group of its own.

    Args:
        scores: Shape (rows, m), float32 or float64.
        kept: Mass to keep in each row, in (0, m).
        beta: Sharpness.
        threshold: Shape (rows, 1): a score to centre each row at.
    """
    x = (scores - threshold) * beta
    m = scores.shape[1]
    offset = math.log(kept) - math.log(m - kept)
    low, high = offset - x.amax(1, keepdim=True), offset - x.amin(1, keepdim=True)
    mu = torch.zeros_like(low).clamp(low, high)
    tolerance = 1e-13 if scores.dtype == torch.float64 else 2e-6
    for _ in range(_MAX_PASSES):
        keep = torch.sigmoid(x + mu)
        error = keep.sum(1, keepdim=True) - kept
        if bool((error.abs() <= tolerance * kept).all()):
            break
        high = torch.where(error > 0, mu, high)
        low = torch.where(error < 0, mu, low)
        slope = (keep * torch.sigmoid(-x - mu)).sum(1, keepdim=True)
        newton = mu - error / slope
        inside = (newton > low) & (newton < high)
        step = torch.where(inside, newton, 0.5 * (low + high))
        if bool((step == mu).all()):
            break
        mu = step
    return torch.sigmoid(x + mu)


def pull_back_rows(spread: Tensor, upstream: Tensor, beta: float) -> Tensor:
    """`pull_back` with unit costs and one group per row."""
    price = (upstream * spread).sum(1, keepdim=True) / spread.sum(1, keepdim=True)
    price = torch.where(torch.isfinite(price), price, 0.0)
    return (upstream - price).mul_(spread).mul_(beta)


def _bracket(
    scores: Sequence[Tensor], budget: float, total: float, beta: float, reference: float
) -> tuple[float, float]:
    """Bound mu by the cases that all scores equal the largest or the smallest one."""
    extremes = torch.stack([torch.stack(s.aminmax()) for s in scores if s.numel()]).double()
    lowest, highest = float(extremes[:, 0].min()), float(extremes[:, 1].max())
    even = math.log(budget) - math.log(total - budget)
    return even - beta * (highest - reference), even - beta * (lowest - reference)


def _mass(
    scores: Sequence[Tensor],
    costs: Sequence[float | Tensor],
    beta: float,
    reference: float,
    mu: float,
    sign: float,
) -> tuple[float, float]:
    """Return sum c sigmoid(sign x) and sum c sigmoid(x) sigmoid(-x), one pass over the scores.

    Partial sums of cache-sized chunks are exact to float32 rounding and added up in float64.
    """
    device = scores[0].device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for score, cost in zip(scores, costs, strict=True):
        flat = score.flatten()
        size = _CHUNK if device.type == "cpu" else max(flat.numel(), 1)
        per_entry = cost.flatten().split(size) if isinstance(cost, Tensor) else None
        for i, chunk in enumerate(flat.split(size)):
            x = (chunk - reference).mul_(beta).add_(mu).mul_(sign)
            side, other = torch.sigmoid(x), x.neg_().sigmoid_()
            if per_entry is not None:
                side.mul_(per_entry[i])
            partial = torch.stack((side.sum(), torch.dot(side, other))).double()
            sums += partial if per_entry is not None else partial * float(cost)
    mass, slope = sums.tolist()
    return mass, slope
