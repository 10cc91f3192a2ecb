"""What groups of weights may keep, as numbers of units or cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from spartan.errors import BudgetError
from spartan.patterns import STORED_BLOCKS, Block, Pattern
from spartan.prunable import Prunable


@dataclass(frozen=True)
class Share:
    """What one group of weights may keep together.

    Attributes:
        members: Indices of the group's weights in the list of prunables.
        costs: Cost of one unit of each member, in the currency of `total` and `kept`.
        total: Cost of keeping everything.
        kept: Cost that may be kept. An integer number of units when all units cost the same.
        rows: Whether `total` and `kept` are units per row of an N:M pattern.
    """

    members: tuple[int, ...]
    costs: tuple[float, ...]
    total: float
    kept: float
    rows: bool = False

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


def make_share(
    members: Sequence[int], units: list[int], costs: list[float], density: Fraction
) -> Share:
    """Return the share of a density of the cost.

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
        return Share(members, (1.0,) * len(members), float(count), round(density * count))
    # Costs are relative: scaled to a mean of 1 a unit, so that scores stay in units of |weight|.
    total = sum(costs[i] * units[i] for i in members)
    scale = count / total
    scaled = tuple(costs[i] * scale for i in members)
    if float(density) * count < min(scaled):
        raise BudgetError(
            f"A density of {float(density):g} is less than the cheapest unit costs; the smallest "
            f"reachable density is {min(scaled) / count:.3g}."
        )
    return Share(members, scaled, float(count), float(density) * count)


def share_of_bytes(
    members: Sequence[int],
    weights: Sequence[Prunable],
    pattern: Pattern,
    units: list[int],
    density: Fraction,
) -> Share:
    """Turn bytes of the packed file into a budget of units.

    Two layouts bound what a weight takes (`deploy.layouts` has more, and packing takes the
    smallest): the kept values and one bit a weight, or a block if there is a layout for such
    blocks; or, for single weights, the kept values with one byte each, and as much again for every
    256th weight, should gaps not fit a byte.
    """
    sizes = [weights[i].parameter.element_size() for i in members]
    numels = [pattern.unit_numel(weights[i]) for i in members]
    counts = [units[i] for i in members]
    dense = sum(s * m * n for s, m, n in zip(sizes, numels, counts, strict=True))

    def of_layout(per_value: int, fixed: float) -> Share | None:
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
        return make_share(members, units, every, min(kept, Fraction(1)))

    shapes = 8 * max(len(weights[i].shape) for i in members)
    # Rows of bits are padded to whole bytes.
    bits = sum(
        n * (1 if _stored_as_blocks(weights[i], pattern) else m) / 8 + weights[i].shape[0] + shapes
        for i, n, m in zip(members, counts, numels, strict=True)
    )
    shares = [of_layout(0, bits)]
    if all(m == 1 for m in numels):
        fillers = sum((s + 1) * n / 256 + shapes for s, n in zip(sizes, counts, strict=True))
        shares.append(of_layout(1, fillers))
    possible = [share for share in shares if share is not None]
    if density == 1:
        return Share(tuple(members), (1.0,) * len(counts), float(sum(counts)), sum(counts))
    if not possible:
        names = ", ".join(repr(weights[i].name) for i in list(members)[:3])
        raise BudgetError(
            f"{float(density):g} of {dense:,} bytes has no room for a weight of {names}: its "
            "layout alone takes as much. Ask for more bytes, or for larger blocks."
        )
    return max(possible, key=lambda share: share.kept / share.total)


def _stored_as_blocks(weight: Prunable, pattern: Pattern) -> bool:
    """Whether the blocks of a weight are blocks of it as a matrix, of a size that is stored."""
    if not isinstance(pattern, Block):
        return False
    rows, cols = pattern.rows, pattern.cols
    if weight.input_first:
        rows, cols = cols, rows
    return (rows, cols) in STORED_BLOCKS and (cols == 1 or weight.kernel_numel == 1)


def refuse_dead_layers(
    shares: Sequence[Share], weights: Sequence[Prunable], units: Sequence[int]
) -> None:
    """Raise `BudgetError` if a layer with a budget of its own would keep nothing."""
    dead = [weights[s.members[0]].name for s in shares if s.kept == 0]
    if dead:
        smallest = 1 / min(units[s.members[0]] for s in shares if s.kept == 0)
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
