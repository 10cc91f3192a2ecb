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

The root is found by Halley's method, Newton's with the second derivative, on the logarithm of the
mass: a pass over the scores gives all three sums, and the error after a step of size d is of order
d^3. A warm start is mostly so near that one pass is enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spartan.errors import BudgetError
from spartan.kernels import Dual, Mass, Scores, masses
from spartan.selection.hard import check_topk_arguments, find_cutoff, unit_scores

_MAX_PASSES = 200  # a guard: bisection from any bracket of float64 numbers ends earlier
# Bisection alone would bring the widest bracket of a row to float32 precision in these.
_ROW_PASSES = 40


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
    check_topk_arguments(values, budget, costs)
    if not (math.isfinite(beta) and beta > 0):
        raise BudgetError(f"beta={beta} must be positive and finite.")
    mask: Tensor = _SoftTopK.apply(values, float(budget), costs, float(beta))  # type: ignore[no-untyped-call]
    return mask


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, budget: float, costs: Tensor | None, beta: float
    ) -> Tensor:
        scores = unit_scores(values, costs)
        dual = solve(scores, budget, beta, find_cutoff(scores, budget).threshold)
        logits = dual.logits(scores.of(scores.tensors[0], 0))
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


class DualSearch:
    """The search for the dual variable of one group.

    Args:
        scores: Unit values u; several tensors share one dual.
        budget: Mass to keep.
        beta: Sharpness, positive.
        reference: Score to centre at; the hard threshold, or one near it.
        start: First guess for mu.

    Attributes:
        scores: As given.
        dual: The best dual so far: the solution once `done`.
        dropped: Whether the search works on the dropped mass, the smaller one. Its logarithm is
            the closer to linear.
        done: Whether the mass meets the budget to rounding.
        passes: Number of sums that were taken in.
    """

    def __init__(
        self, scores: Scores, budget: float, beta: float, reference: float, start: float = 0.0
    ) -> None:
        self.scores = scores
        self.dropped = 2 * budget > scores.total
        self.done = budget >= scores.total or budget <= 0
        self.passes = 0
        if self.done:
            reference, start = 0.0, math.copysign(math.inf, budget - scores.total / 2)
        self.dual = Dual(beta, 0.0 if math.isinf(reference) else reference, start)
        self._goal = scores.total - budget if self.dropped else budget
        double = scores.dtype == torch.float64
        self._tolerance, self._resolution = (1e-13, 4e-16) if double else (1e-8, 1e-7)
        self._last_step = 1e-4 if double else 1e-2
        self._low, self._high = -math.inf, math.inf
        self._width, self._reach = math.inf, 16.0

    def take(self, mass: Mass) -> None:
        """Take in the sums at `dual`, and move it."""
        self.passes += 1
        sign = -1.0 if self.dropped else 1.0
        nu = sign * self.dual.mu  # the mass grows with nu
        error = abs(mass.mass - self._goal)
        if error <= max(self._tolerance * self._goal, self._resolution * mass.slope):
            self.done = True
            return
        if mass.mass > self._goal:
            self._high = nu
        else:
            self._low = nu
        step = self._halley(mass)
        width, self._width = self._width, self._high - self._low
        # At a large beta the mass is a staircase: a step may be misled by the local slope.
        stalls = abs(step) > 1.0 and 2 * self._width > width
        inside = self._low < nu + step < self._high and abs(step) <= self._reach
        if step != 0.0 and inside and not stalls:
            # Near the root the next error is of order step^3: below what a pass could measure.
            self.done = abs(step) <= self._last_step
        else:
            step = self._bisect(nu)
        bound = self._resolution * max(1.0, abs(nu))
        self.done = self.done or abs(step) <= bound or self.passes >= _MAX_PASSES
        self.dual = Dual(self.dual.beta, self.dual.reference, sign * (nu + step))

    def _halley(self, mass: Mass) -> float:
        """Return the step for log mass = log goal, 0 where there is none."""
        if mass.mass <= 0 or mass.slope <= 0:
            return 0.0
        error = math.log(mass.mass / self._goal)
        first = mass.slope / mass.mass
        newton = -error / first
        if abs(newton) > 1.0:
            # The logarithm is concave: from afar Newton's step is the one that cannot fail.
            return newton
        second = mass.curve / mass.mass - first * first
        return newton / (1.0 + 0.5 * newton * second / first)

    def _bisect(self, nu: float) -> float:
        """Return the step to the middle of the bracket; outwards, ever farther, if it is open."""
        if math.isfinite(self._low) and math.isfinite(self._high):
            return 0.5 * (self._low + self._high) - nu
        self._reach *= 4
        return self._reach if math.isinf(self._high) else -self._reach


def solve_all(searches: Sequence[DualSearch]) -> None:
    """Bring searches to their end, with one read-back a round for all of them."""
    while waiting := [search for search in searches if not search.done]:
        queries = [(search.scores, search.dual, search.dropped) for search in waiting]
        for search, mass in zip(waiting, masses(queries), strict=True):
            search.take(mass)


def solve(scores: Scores, budget: float, beta: float, reference: float, start: float = 0.0) -> Dual:
    """Find the dual variable of one group; see `DualSearch`."""
    search = DualSearch(scores, budget, beta, reference, start)
    solve_all([search])
    return search.dual


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
        kept: Mass to keep in each row, in (0, m]; m keeps everything.
        beta: Sharpness.
        threshold: Shape (rows, 1): a score to centre each row at.
    """
    m = scores.shape[1]
    if kept >= m:
        return torch.ones_like(scores)
    x = (scores - threshold) * beta
    offset = math.log(kept) - math.log(m - kept)
    low, high = offset - x.amax(1, keepdim=True), offset - x.amin(1, keepdim=True)
    mu = torch.zeros_like(low).clamp(low, high)
    tolerance = 1e-13 if scores.dtype == torch.float64 else 2e-6
    on_cpu = scores.device.type == "cpu"
    for _ in range(_MAX_PASSES if on_cpu else _ROW_PASSES):
        keep = torch.sigmoid(x + mu)
        error = keep.sum(1, keepdim=True) - kept
        # Asking whether all rows are done would make a GPU wait.
        if on_cpu and bool((error.abs() <= tolerance * kept).all()):
            break
        high = torch.where(error > 0, mu, high)
        low = torch.where(error < 0, mu, low)
        slope = (keep * torch.sigmoid(-x - mu)).sum(1, keepdim=True)
        newton = mu - error / slope
        inside = (newton > low) & (newton < high)
        step = torch.where(inside, newton, 0.5 * (low + high))
        if on_cpu and bool((step == mu).all()):
            break
        mu = step
    return torch.sigmoid(x + mu)


def pull_back_rows(spread: Tensor, upstream: Tensor, beta: float) -> Tensor:
    """`pull_back` with unit costs and one group per row."""
    price = (upstream * spread).sum(1, keepdim=True) / spread.sum(1, keepdim=True)
    price = torch.where(torch.isfinite(price), price, 0.0)
    return (upstream - price).mul_(spread).mul_(beta)
