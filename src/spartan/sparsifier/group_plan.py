"""`GroupPlan`: which weights share which budget, in a model whose budget may change on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from spartan.budgets.budget import Budget
from spartan.budgets.group_budget import GroupBudget
from spartan.deploy.latency import plan_latency
from spartan.errors import StateError
from spartan.methods.masking.contract import MaskingMethod
from spartan.methods.masking.groups import make_group
from spartan.weights.patterns import Pattern
from spartan.weights.prunable import Prunable


class GroupPlan:
    """The groups of weights of a masking run.

    Args:
        model: The model.
        prunables: Its prunable weights.
        pattern: What a unit is.
        budget: How much may stay.
        method: The method: what it keeps of weights, and whether it lets layers keep nothing.

    Attributes:
        budget: How much may stay now.
        groups: The weights that share a budget.
        weights: All of them, in the order of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        prunables: Sequence[Prunable],
        pattern: Pattern,
        budget: Budget,
        method: MaskingMethod,
    ) -> None:
        self._model, self._prunables, self._pattern = model, prunables, pattern
        self.budget = budget
        kinds = method.group_state, method.weight_state
        self.groups = [make_group(b, prunables, pattern, *kinds) for b in self._plan(budget)]
        by_name = {weight.name: weight for group in self.groups for weight in group.weights}
        self.weights = [by_name[prunable.name] for prunable in prunables]
        # Where no competition decides what layers keep, none of them needs to be held up.
        self._floors = method.finds_masks and not method.learns_rates
        self._lift_floors()

    @property
    def at_budget(self) -> bool:
        """Whether the masks hold the budget."""
        return all(group.at_budget for group in self.groups)

    def retarget(self, budget: Budget) -> None:
        """Let the same groups have another budget.

        Raises:
            StateError: The budget groups weights otherwise. Nothing is changed then.
        """
        budgets = self._plan(budget)
        if [one.members for one in budgets] != [group.budget.members for group in self.groups]:
            raise StateError(
                f"{budget} groups weights otherwise than {self.budget}, and groups have states of "
                "their own: keep the allocation, and change the density."
            )
        for group, one in zip(self.groups, budgets, strict=True):
            group.adopt(one)
            group.state.settled = False  # so that weights without a gradient compete once more
        self.budget = budget
        self._lift_floors()

    def settings(self) -> dict[str, Any]:
        """Return what a state is compared by, as plain values."""
        return {
            "pattern": str(self._pattern),
            "latency_ms": self.budget.latency_ms,
            "floors": [list(group.budget.floors) for group in self.groups],
            "budgets": [[b.kept, b.total, *b.costs] for b in (g.budget for g in self.groups)],
        }

    def _plan(self, budget: Budget) -> list[GroupBudget]:
        if budget.latency_ms is None:
            return budget.plan(self._model, self._prunables, self._pattern)
        return plan_latency(budget, self._model, self._prunables, self._pattern)

    def _lift_floors(self) -> None:
        for group in self.groups if not self._floors else []:
            group.lift_floors()
