"""Exact hard top-k over many tensors at once, without a sort."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spartan.errors import BudgetError, renamed
from spartan.kernels import Cutoff, ScanRequest, ScanResult, Scores, kept, masks_of, scan
from spartan.kernels.memory import flat
from spartan.kernels.selection import SLACK


def hard_topk(values: Tensor, budget: float, costs: Tensor | None = None) -> Tensor:
    """Mark the entries with the largest value per unit cost that fit the budget.

    Entries are taken in order of decreasing values / costs, ties by position, up to (and not
    including) the first that no longer fits: exactly `budget` entries for unit costs.

    Args:
        values: Any shape; float64, float32, float16 or bfloat16.
        budget: Cost that may be kept; a number of entries when `costs` is None.
        costs: Positive cost of each entry, same shape; None means 1 each.

    Returns:
        Boolean mask of the shape of `values`.

    Raises:
        BudgetError: The budget or a cost is out of range, or a value is not finite.
    """
    check_topk_arguments(values, budget, costs)
    scores = unit_scores(values.detach(), costs)
    return masks_of(scores, find_cutoff(scores, budget))[0]


def find_cutoff(scores: Scores, budget: float, floors: Sequence[int] = ()) -> Cutoff:
    """Find which entries a budget keeps; see `spartan.kernels.ScanRequest`.

    Args:
        scores: The scores that compete.
        budget: Total cost that may be kept.
        floors: How many entries of each tensor stay at least; none by default.
    """
    request = ScanRequest(scores, budget, counted=bool(floors))
    return held_to_floors(request, scan([request])[0], floors)


def held_to_floors(request: ScanRequest, found: ScanResult, floors: Sequence[int]) -> Cutoff:
    """Return the best choice of which every tensor keeps its floor.

    A tensor that would keep less keeps its largest entries, as many as its floor; the others
    compete for what that leaves. They get less than before, so that more of them may fall below
    theirs, until none does.

    Args:
        request: What was looked for, with `counted`.
        found: What was found.
        floors: How many entries of each tensor stay at least; together they fit the budget. Empty
            for none.
    """
    scores, cutoff = request.scores, found.cutoff
    free, above = list(range(len(floors))), found.above
    held: dict[int, Cutoff] = {}
    while short := [
        i
        for i, count in zip(free, above, strict=False)
        if count < floors[i] and _kept(scores, cutoff, i) < floors[i]
    ]:
        left = request.budget - sum(_cost(scores, i) * floors[i] for i in (*held, *short))
        free = [i for i in free if i not in short]
        alone = [ScanRequest(scores.part([i]), _cost(scores, i) * floors[i]) for i in short]
        among = [dataclasses.replace(request, scores=scores.part(free), budget=left, dual=None)]
        results = scan([*alone, *(among if free else [])])
        held |= {i: one.cutoff for i, one in zip(short, results, strict=False)}
        ends = {i: one.tie_ends[0] for i, one in held.items()}
        threshold, above = cutoff.threshold, []
        if free:
            threshold, above = results[-1].cutoff.threshold, results[-1].above
            ends |= dict(zip(free, results[-1].cutoff.tie_ends, strict=True))
        lowered = {i: one.threshold for i, one in held.items()}
        cutoff = Cutoff(threshold, [ends[i] for i in sorted(ends)], lowered)
    return cutoff


def _kept(scores: Scores, cutoff: Cutoff, index: int) -> int:
    """Count what a tensor keeps, ties at the threshold included."""
    return int(kept(scores.of(flat(scores.tensors[index]), index), *cutoff.of(index)).sum())


def _cost(scores: Scores, index: int) -> float:
    cost = scores.costs[index]
    assert not isinstance(cost, Tensor)
    return cost


def select_rows(scores: Tensor, kept: int) -> Tensor:
    """Mark the `kept` highest scores of each row, ties by position.

    Args:
        scores: Shape (rows, m).
        kept: Entries to keep in each row.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, order[:, :kept], True)


def unit_scores(values: Tensor, costs: Tensor | None) -> Scores:
    """Return the scores values / costs of one tensor."""
    values = values.contiguous()
    if costs is None:
        return Scores([values], [1.0], [1.0], absolute=False)
    costs = costs.contiguous()
    u = values if values.dtype == torch.float64 else values.float()
    return Scores([u / costs.to(u.dtype)], [1.0], [costs], absolute=False)


def check_topk_arguments(values: Tensor, budget: float, costs: Tensor | None) -> None:
    """Raise `BudgetError` unless the arguments of a top-k make sense."""
    if not values.is_floating_point() or values.numel() == 0:
        raise BudgetError("values must be a floating-point tensor with at least one entry.")
    if not bool(torch.isfinite(values).all()):
        raise BudgetError("values contain NaN or infinity; a top-k needs finite numbers.")
    if costs is not None:
        if costs.shape != values.shape:
            raise BudgetError(
                f"costs have shape {tuple(costs.shape)}, values have "
                f"{tuple(values.shape)}; they must agree."
            )
        if not bool((torch.isfinite(costs) & (costs > 0)).all()):
            raise BudgetError("costs must be positive and finite.")
    total = values.numel() if costs is None else float(costs.sum(dtype=torch.float64))
    if not 0 <= budget <= total * (1 + SLACK):
        raise BudgetError(f"budget={budget} must lie between 0 and the total cost {total:g}.")


def __getattr__(name: str) -> Any:
    """Find what version 0.1 called otherwise."""
    if name == "find_cut":
        renamed("spartan.selection.hard.find_cut", "find_cutoff", stacklevel=3)
        return find_cutoff
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
