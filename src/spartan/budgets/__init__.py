"""Budgets: a density, FLOPs, bytes or milliseconds, as numbers of kept units per weight."""

from spartan.budgets.budget import Budget
from spartan.budgets.group_budget import GroupBudget, RowBudget

__all__ = ["Budget", "GroupBudget", "RowBudget"]
