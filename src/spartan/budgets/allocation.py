"""How a budget spreads over layers: Erdős-Rényi densities, and rounding to an exact sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spartan.budgets.group_budget import GroupBudget
from spartan.errors import BudgetError
from spartan.weights.prunable import Prunable


def erk_densities(
    shapes: Sequence[tuple[int, ...]], density: float, totals: Sequence[float] | None = None
) -> list[float]:
    """Return Erdős-Rényi-kernel densities: min(1, a * sum(shape) / prod(shape)) for each layer.

    The factor a is set such that the layers together keep `density` of their total cost; layers
    that reach 1 hand their excess to the others.

    Args:
        shapes: Weight shapes.
        density: Density of all layers together, in (0, 1].
        totals: Cost of each whole layer; by default its number of weights.
    """
    coefficients = [sum(shape) / math.prod(shape) for shape in shapes]
    sizes = [float(math.prod(shape)) for shape in shapes] if totals is None else list(totals)
    full: set[int] = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in full]
        left = density * sum(sizes) - sum(sizes[i] for i in full)
        raw = sum(coefficients[i] * sizes[i] for i in free)
        factor = left / raw if raw else 0.0
        overfull = {i for i in free if factor * coefficients[i] > 1.0}
        if not overfull:
            return [1.0 if i in full else factor * coefficients[i] for i in range(len(shapes))]
        full |= overfull


def refuse_dead_layers(
    budgets: Sequence[GroupBudget], weights: Sequence[Prunable], units: Sequence[int]
) -> None:
    """Raise `BudgetError` if a layer with a budget of its own would keep nothing."""
    dead = [weights[s.members[0]].name for s in budgets if s.kept == 0]
    if dead:
        smallest = 1 / min(units[s.members[0]] for s in budgets if s.kept == 0)
        raise BudgetError(
            f"This budget keeps nothing of {', '.join(map(repr, dead))}. Raise the density (one "
            f"unit there is {smallest:.3g}), exclude these layers, or allocate globally."
        )


def round_to_sum(values: Sequence[float], total: int) -> list[int]:
    """Round to integers that sum to `total`, the largest fractional parts up first."""
    floors = [math.floor(v) for v in values]
    order = sorted(range(len(values)), key=lambda i: floors[i] - values[i])
    for i in order[: total - sum(floors)]:
        floors[i] += 1
    return floors
