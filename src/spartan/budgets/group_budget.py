"""`GroupBudget`: the units, or the cost, that a group of weights may keep; N:M by rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from spartan.errors import BudgetError
from spartan.weights.prunable import Prunable


@dataclass(frozen=True)
class GroupBudget:
    """What one group of weights may keep together.

    Attributes:
        members: Indices of the group's weights in the list of prunables.
        costs: Cost of one unit of each member, in the currency of `total` and `kept`.
        total: Cost of keeping everything.
        kept: Cost that may be kept. An integer number of units when all units cost the same.
        floors: Units that each member keeps at least, all together within `kept`; () for none.
    """

    members: tuple[int, ...]
    costs: tuple[float, ...]
    total: float
    kept: float
    floors: tuple[int, ...] = ()

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


def with_floors(
    budget: GroupBudget, weights: Sequence[Prunable], units: list[int], share: float
) -> GroupBudget:
    """Return the budget with a floor for each weight, so that signals pass through every layer.

    A floor is `share` of the units that the weight would keep if all layers had the same density,
    and at most as many as it has outputs. Where all of them together take more than the budget,
    they are one unit each, and where that is too much as well, there are none.

    Args:
        budget: The budget of weights that compete with each other.
        weights: All prunable weights.
        units: Units of each.
        share: Fraction of the uniform share; 0 for no floors.
    """
    if share == 0:
        return budget
    density = budget.kept / budget.total
    wanted = tuple(
        min(units[i], weights[i].outputs, math.ceil(share * density * units[i]))
        for i in budget.members
    )
    for floors in (wanted, (1,) * len(wanted)):
        needed = sum(floor * cost for floor, cost in zip(floors, budget.costs, strict=True))
        if needed <= budget.kept:
            return replace(budget, floors=floors)
    return budget
