"""How much each layer may keep, as integers."""

from spartan.budgets.budget import Budget
from spartan.budgets.group_budget import GroupBudget, RowBudget

__all__ = ["Budget", "GroupBudget", "RowBudget"]
