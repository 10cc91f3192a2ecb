"""`GroupBudget`: the units, or the cost, that a group of weights may keep; N:M by rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from spartan.errors import BudgetError


@dataclass(frozen=True)
class GroupBudget:
    """What one group of weights may keep together.

    Attributes:
        members: Indices of the group's weights in the list of prunables.
        costs: Cost of one unit of each member, in the currency of `total` and `kept`.
        total: Cost of keeping everything.
        kept: Cost that may be kept. An integer number of units when all units cost the same.
    """

    members: tuple[int, ...]
    costs: tuple[float, ...]
    total: float
    kept: float

    @property
    def counted(self) -> bool:
        """Whether all units cost the same, so that the budget is a number of units."""
        return all(cost == 1.0 for cost in self.costs)

    def at(self, progress: float) -> float:
        """Return the budget `progress` of the way from everything (0) to `kept` (1)."""
        if progress >= 1.0:
            return self.kept
        between = self.total + (self.kept - self.total) * progress
        return round(between) if self.counted else between

    def of(self, density: float) -> float:
        """Return the budget at a density of this group."""
        return round(density * self.total) if self.counted else density * self.total

    def without(self, spent: float) -> float:
        """Return what `kept` leaves when some weights of the group take `spent` of it."""
        return self.kept - spent


@dataclass(frozen=True)
class RowBudget(GroupBudget):
    """What every row of an N:M pattern may keep: `kept` = n of `total` = m units, in each row."""

    def without(self, spent: float) -> float:
        return self.kept  # rows do not share


def make_group_budget(
    members: Sequence[int], units: list[int], costs: list[float], density: Fraction
) -> GroupBudget:
    """Return the budget of a density of the cost.

    Args:
        members: Indices of the group's weights.
        units: Units of each weight, of all groups.
        costs: Cost of a unit of each weight, of all groups.
        density: Fraction of the cost that may be kept.

    Raises:
        BudgetError: That is less than the cheapest unit costs.
    """
    members = tuple(members)
    count = sum(units[i] for i in members)
    if len({costs[i] for i in members}) == 1:
        return GroupBudget(members, (1.0,) * len(members), float(count), round(density * count))
    # Costs are relative: scaled to a mean of 1 a unit, so that scores stay in units of |weight|.
    total = sum(costs[i] * units[i] for i in members)
    scale = count / total
    scaled = tuple(costs[i] * scale for i in members)
    if float(density) * count < min(scaled):
        raise BudgetError(
            f"A density of {float(density):g} is less than the cheapest unit costs; the smallest "
            f"reachable density is {min(scaled) / count:.3g}."
        )
    return GroupBudget(members, scaled, float(count), float(density) * count)
