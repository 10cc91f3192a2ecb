"""Byte budgets: what a tensor takes in a packed file, and how many units fit a size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from spartan.budgets.group_budget import GroupBudget, make_group_budget
from spartan.errors import BudgetError
from spartan.weights.patterns import Pattern
from spartan.weights.prunable import Prunable

# Blocks that packed files have a layout for: rows x columns of a weight seen as a matrix of
# (first dimension, all others).
STORED_BLOCKS = (
    *((32, 32), (16, 16), (8, 8), (4, 4)),
    *((32, 1), (16, 1), (8, 1), (4, 1), (1, 16), (1, 8)),
)


def budget_of_bytes(
    members: Sequence[int],
    weights: Sequence[Prunable],
    pattern: Pattern,
    units: list[int],
    density: Fraction,
) -> GroupBudget:
    """Turn bytes of the packed file into a budget of units.

    Two layouts bound what a weight takes (`spartan.deploy.layouts` has more, and packing takes the
    smallest): the kept values and one bit a weight, or a block if there is a layout for such
    blocks; or, for single weights, the kept values with one byte each, and as much again for every
    256th weight, should gaps not fit a byte.
    """
    sizes = [weights[i].parameter.element_size() for i in members]
    numels = [pattern.unit_numel(weights[i]) for i in members]
    counts = [units[i] for i in members]
    dense = sum(s * m * n for s, m, n in zip(sizes, numels, counts, strict=True))

    def of_layout(per_value: int, fixed: float) -> GroupBudget | None:
        costs = [float((s + per_value) * m) for s, m in zip(sizes, numels, strict=True)]
        total = sum(c * n for c, n in zip(costs, counts, strict=True))
        kept = Fraction((float(density) * dense - fixed) / total)
        if kept * sum(counts) < 1:
            return None
        # Never a byte more: the number of units is rounded down.
        if len(set(costs)) == 1:
            kept = Fraction(math.floor(kept * sum(counts)), sum(counts))
        by_index = dict(zip(members, costs, strict=True))
        every = [by_index.get(i, 1.0) for i in range(len(units))]
        return make_group_budget(members, units, every, min(kept, Fraction(1)))

    shapes = 8 * max(len(weights[i].shape) for i in members)
    # Rows of bits are padded to whole bytes.
    bits = sum(
        n * (1 if _stored_as_blocks(weights[i], pattern) else m) / 8 + weights[i].shape[0] + shapes
        for i, n, m in zip(members, counts, numels, strict=True)
    )
    budgets = [of_layout(0, bits)]
    if all(m == 1 for m in numels):
        fillers = sum((s + 1) * n / 256 + shapes for s, n in zip(sizes, counts, strict=True))
        budgets.append(of_layout(1, fillers))
    possible = [budget for budget in budgets if budget is not None]
    if density == 1:
        return GroupBudget(tuple(members), (1.0,) * len(counts), float(sum(counts)), sum(counts))
    if not possible:
        names = ", ".join(repr(weights[i].name) for i in list(members)[:3])
        raise BudgetError(
            f"{float(density):g} of {dense:,} bytes has no room for a weight of {names}: its "
            "layout alone takes as much. Ask for more bytes, or for larger blocks."
        )
    return max(possible, key=lambda budget: budget.kept / budget.total)


def _stored_as_blocks(weight: Prunable, pattern: Pattern) -> bool:
    """Whether the units of a weight are blocks of it as a matrix, of a size that is stored."""
    tile = pattern.tile(weight)
    if tile is None or weight.stacked:
        return False
    rows, cols = reversed(tile) if weight.input_first else tile
    return (rows, cols) in STORED_BLOCKS and (cols == 1 or weight.kernel_numel == 1)
