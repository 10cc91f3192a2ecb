r"""Soft top-k masks from a dual variable: their sums, and the gradient through them.

With a dual variable solved (see `spartan.selection.soft`), an entry of score u has the mask
m = sigmoid(β (u - reference) + μ), and the gradient G of w = θ · m comes back as

    dL/dθ = m G + sign(θ) β scale s (q - price · cost),  q = G θ,  s = m (1 - m),
    price = Σ q s / Σ cost s.

Where the model computes with w = θ of the kept entries instead, without their m, the gradient of
what is pruned is damped: dL/dθ = min(1, m / m at the reference) G.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spartan.kernels.dispatch import native_for
from spartan.kernels.readback import read_back
from spartan.kernels.scores import Scores, flat_pieces, wide


@dataclass(frozen=True)
class Dual:
    """The solved dual variable: m = sigmoid(beta (u - reference) + mu).

    Attributes:
        beta: Sharpness, per unit of u.
        reference: Score at which the logit is mu. Near the threshold, where the entries that
            matter lie: their logits are then small, and float32 is enough for any beta.
        mu: The dual variable; +inf keeps everything, -inf nothing.
    """

    beta: float
    reference: float
    mu: float

    @property
    def threshold(self) -> float:
        """The soft threshold: the score at which the mask is one half."""
        return self.reference - self.mu / self.beta

    def centred(self, reference: float) -> Dual:
        """Return the same masks, with their logits centred at another score.

        Args:
            reference: The score; -inf, below all scores, is taken as 0.
        """
        reference = 0.0 if reference == -math.inf else reference
        if math.isinf(self.mu) or math.isinf(reference):
            return self
        return Dual(self.beta, reference, self.mu + self.beta * (reference - self.reference))

    @property
    def per_reference(self) -> float:
        """One over the soft mask at the reference, at most what float32 can hold."""
        return min(1.0 + math.exp(min(-self.mu, 80.0)), 1e30)

    def logits(self, scores: Tensor) -> Tensor:
        """Return the logits in the dtype of the scores."""
        if math.isinf(self.mu):
            return torch.full_like(scores, self.mu)
        return (scores - self.reference).mul_(self.beta).add_(self.mu)

    def mask(self, scores: Tensor) -> Tensor:
        """Return the soft mask of `scores`."""
        return self.logits(scores).sigmoid_()

    def damping(self, scores: Tensor) -> Tensor:
        """Return min(1, m / m at the reference); exactly 1 from the reference on."""
        logits = self.logits(scores)
        below = (logits.sigmoid() * self.per_reference).clamp_(max=1)
        return torch.where(logits >= self.mu, 1.0, below)

    def astuple(self) -> tuple[float, float, float]:
        """Return (beta, reference, mu)."""
        return self.beta, self.reference, self.mu


class Mass(NamedTuple):
    """Sums over all entries: cost · m, and its first two derivatives by μ.

    Of the dropped mass, cost · (1 - m), the derivatives are by -μ.
    """

    mass: float
    slope: float
    curve: float


def native_mass(scores: Scores, dual: Dual, dropped: bool) -> Mass | None:
    """Sum natively; None if the native kernels do not serve these tensors."""
    native, costs = native_for(scores.tensors), scores.plain_costs
    if native is None or costs is None:
        return None
    return Mass(
        *native.mass(
            tensors=scores.tensors,
            scales=scores.scales,
            costs=costs,
            absolute=scores.absolute,
            dual=dual.astuple(),
            dropped=dropped,
            threads=torch.get_num_threads(),
        )
    )


def mass_on_device(scores: Scores, dual: Dual, dropped: bool) -> Tensor:
    """Return the three sums of a `Mass` as a float64 tensor; nothing is read back.

    Of each mask the smaller side is summed, σ(-|x|), and the masks that are nearer to 1 are
    counted: many that are almost 1 would all carry the same rounding error. The two derivatives are
    of their size, and float32 sums of chunks are enough.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=scores.device)
    for u, cost in scores.pieces():
        x = dual.logits(u)
        if dropped:
            x.neg_()
        upper = x >= 0
        small = x.abs_().neg_().sigmoid_()
        s = small * (1.0 - small)
        m = torch.where(upper, 1.0 - small, small)
        signed = torch.where(upper, -small, small)
        if isinstance(cost, Tensor):
            whole = (cost * upper).sum(dtype=torch.float64)
            mass = (signed.double() * cost).sum() + whole
            parts = mass, (s * cost).sum(), (s * cost * m).sum()
        else:
            mass = signed.sum(dtype=torch.float64) + upper.sum()
            parts = mass, s.sum(), torch.dot(s, m)
        partial = torch.stack([part.double() for part in parts])
        sums += partial if isinstance(cost, Tensor) else partial * float(cost)
    # s (1 - 2 m), summed
    sums[2] = sums[1] - 2.0 * sums[2]
    return sums


def masses(queries: Sequence[tuple[Scores, Dual, bool]]) -> list[Mass]:
    """Sum soft masks (scores, dual, dropped) with one read-back for all of them."""
    found = [native_mass(*query) for query in queries]
    waiting = [i for i, mass in enumerate(found) if mass is None]
    if waiting:
        rows = read_back([mass_on_device(*queries[i]) for i in waiting])
        for i, row in zip(waiting, rows, strict=True):
            found[i] = Mass(*row)
    return [mass for mass in found if mass is not None]


def pull_back(
    grads: Sequence[Tensor],
    thetas: Sequence[Tensor],
    scales: Sequence[float],
    costs: Sequence[float],
    duals: Sequence[Dual],
) -> None:
    """Turn the gradients of w = θ · m into gradients of θ, in place.

    One pass sums the price that couples all tensors, one applies it.

    Args:
        grads: G, overwritten.
        thetas: θ, of the same shapes.
        scales: Scores are u = scale · |θ|.
        costs: What an entry of each tensor takes from the budget.
        duals: The dual variable of each tensor.
    """
    native = native_for(grads, thetas)
    if native is None:
        _pull_back(grads, thetas, scales, costs, duals)
        return
    solved = [dual.astuple() for dual in duals]
    threads = torch.get_num_threads()
    earned, spread = native.earn(
        grads=grads, thetas=thetas, scales=scales, costs=costs, duals=solved, threads=threads
    )
    price = earned / spread if spread > 0 else 0.0
    native.pull_back(
        grads=grads,
        thetas=thetas,
        scales=scales,
        costs=costs,
        duals=solved,
        price=price if math.isfinite(price) else 0.0,
        threads=threads,
    )
    for grad in grads:
        torch.autograd.graph.increment_version(grad)


def damp(
    grads: Sequence[Tensor],
    thetas: Sequence[Tensor],
    scales: Sequence[float],
    duals: Sequence[Dual],
) -> None:
    """Multiply gradients by min(1, m / m at the reference), in place.

    Args:
        grads: G, overwritten.
        thetas: θ, of the same shapes.
        scales: Scores are u = scale · |θ|.
        duals: The dual variable of each tensor, centred at the threshold of what is kept.
    """
    native = native_for(grads, thetas)
    if native is not None:
        native.damp(
            grads=grads,
            thetas=thetas,
            scales=scales,
            duals=[dual.astuple() for dual in duals],
            per_mask=[dual.per_reference for dual in duals],
            threads=torch.get_num_threads(),
        )
        for grad in grads:
            torch.autograd.graph.increment_version(grad)
        return
    for grad, theta, scale, dual in zip(grads, thetas, scales, duals, strict=True):
        for g, x in flat_pieces(grad, theta):
            g.mul_(dual.damping(wide(x).abs() * scale))


def _pull_back(
    grads: Sequence[Tensor],
    thetas: Sequence[Tensor],
    scales: Sequence[float],
    costs: Sequence[float],
    duals: Sequence[Dual],
) -> None:
    pieces = [
        (g, x, scale, cost, dual)
        for grad, theta, scale, cost, dual in zip(grads, thetas, scales, costs, duals, strict=True)
        for g, x in flat_pieces(grad, theta)
    ]
    total = torch.zeros(2, dtype=torch.float64, device=grads[0].device)
    for g, x, scale, cost, dual in pieces:
        s = _masks(x, scale, dual)[1]
        total += torch.stack(((s * x * g).sum(), s.sum() * cost)).double()
    price = total[0] / total[1]
    price = torch.where(torch.isfinite(price), price, 0.0)
    for g, x, scale, cost, dual in pieces:
        m, s = _masks(x, scale, dual)
        rate = dual.beta * scale * cost
        term = (x.to(m.dtype) * g).div_(cost).sub_(price.to(m.dtype)).mul_(s).mul_(rate)
        g.copy_(m.mul_(g).add_(term.mul_(x.sign())))


def _masks(theta: Tensor, scale: float, dual: Dual) -> tuple[Tensor, Tensor]:
    """Return m and m (1 - m), in float32 or float64."""
    logits = dual.logits(wide(theta).abs() * scale)
    m = logits.sigmoid()
    return m, logits.neg_().sigmoid_().mul_(m)
