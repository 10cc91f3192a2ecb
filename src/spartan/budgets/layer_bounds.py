"""`LayerBounds`: densities a layer may have, and unit counts within them that fit a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from spartan.errors import BudgetError

_SMALLEST = 1e-15  # density that float64 logits tell from 0, and 1 minus it from 1


@dataclass(frozen=True)
class LayerBounds:
    """What the layers of a network may keep, together and each.

    Attributes:
        names: Of the layers.
        units: Units of each.
        costs: Cost of one unit of each layer, in the currency of `budget`.
        least: Units that each keeps at least.
        most: Units that each keeps at most: those that are not zero already.
        budget: Cost that they may keep together.
    """

    names: Sequence[str]
    units: Sequence[int]
    costs: Sequence[float]
    least: Sequence[int]
    most: Sequence[int]
    budget: float

    def __post_init__(self) -> None:
        needed = sum(k * c for k, c in zip(self.least, self.costs, strict=True))
        if needed > self.budget:
            total = sum(n * c for n, c in zip(self.units, self.costs, strict=True))
            raise BudgetError(
                f"The budget, {self.budget:,.6g} of {total:,.6g}, is less than every layer has to "
                "keep (one unit, and what max_layer_sparsity asks for): the smallest reachable "
                f"density is {math.ceil(1e6 * needed / total) / 1e6:g}."
            )

    def cost(self, counts: Sequence[float]) -> float:
        """Return what some numbers of units cost."""
        return sum(k * c for k, c in zip(counts, self.costs, strict=True))


def least_units(units: Sequence[int], max_layer_sparsity: float) -> list[int]:
    """Return how many units layers keep at least, none losing more than that: one or more."""
    share = 1 - Fraction(str(max_layer_sparsity))
    return [max(1, math.ceil(share * n)) for n in units]


def shift_to(densities: Sequence[float], bounds: LayerBounds) -> list[float]:
    """Return densities that cost exactly the budget, all logits moved by one number.

    Of all densities that cost so much these are nearest to the given ones, in the sum of the
    relative entropies of the layers' units: the shift is the Lagrange multiplier of the budget.
    """

    def at(shift: float) -> list[float]:
        return [
            min(high / n, max(low / n, logistic(logit(d) + shift)))
            for d, low, high, n in zip(
                densities, bounds.least, bounds.most, bounds.units, strict=True
            )
        ]

    def surplus(shift: float) -> float:
        kept = [d * n for d, n in zip(at(shift), bounds.units, strict=True)]
        return bounds.cost(kept) - bounds.budget

    if abs(surplus(0.0)) <= 1e-9 * bounds.budget:
        return at(0.0)
    low, high = -80.0, 80.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if surplus(middle) < 0 else (low, middle)
    return at(low)


def fit_counts(densities: Sequence[float], bounds: LayerBounds) -> list[int]:
    """Return how many units each layer keeps, as near to some densities as the budget allows.

    For equal costs they are exactly the budget's number of units; otherwise no unit more fits.

    Args:
        densities: Wished-for densities, in [0, 1].
        bounds: The budget and the layers.
    """
    if bounds.cost(bounds.most) <= bounds.budget:
        return list(bounds.most)
    exact = [d * n for d, n in zip(shift_to(densities, bounds), bounds.units, strict=True)]
    counts = [max(low, math.floor(x + 1e-9)) for x, low in zip(exact, bounds.least, strict=True)]
    left = bounds.budget - bounds.cost(counts)
    slack = 1e-9 * bounds.budget
    while True:
        # The largest remainders first; then whatever still fits.
        order = sorted(range(len(counts)), key=lambda i: counts[i] - exact[i])
        fitting = [
            i for i in order if counts[i] < bounds.most[i] and bounds.costs[i] <= left + slack
        ]
        if not fitting:
            return counts
        for i in fitting:
            if bounds.costs[i] <= left + slack:
                counts[i] += 1
                left -= bounds.costs[i]


def logit(density: float) -> float:
    """Return log(d / (1 - d)), with finite ends that `logistic` turns back exactly enough."""
    inside = min(max(density, _SMALLEST), 1.0 - _SMALLEST)
    return math.log(inside / (1.0 - inside))


def logistic(x: float) -> float:
    """Return 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + math.exp(-max(x, -700.0)))
