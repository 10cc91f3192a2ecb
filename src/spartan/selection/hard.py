"""Exact hard top-k over many tensors at once, by radix selection instead of a sort."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spartan.errors import BudgetError

# Bits of each radix digit, from the top, by bytes per key. Few bins keep small tensors cheap; one
# digit leaves only the entries near the boundary for the next.
_DIGITS = {4: (12, 10, 10), 8: (12, 13, 13, 13, 13)}
# Kept costs are compared with this relative slack, so that a sum such as 3 x 0.1 still fits 0.3.
_SLACK = 1e-12


@dataclass(frozen=True)
class Selection:
    """Outcome of a hard selection.

    Attributes:
        masks: One boolean mask per score tensor, True where kept.
        threshold: Score of the entry at which the budget is used up: the k-th largest score for
            unit costs. -inf if everything fits.
    """

    masks: list[Tensor]
    threshold: float


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
    check_request(values, budget, costs)
    scores = unit_values(values.detach(), costs)
    return select([scores], [1.0 if costs is None else costs], budget).masks[0]


def select(scores: Sequence[Tensor], costs: Sequence[float | Tensor], budget: float) -> Selection:
    """Select the entries with the highest scores over several tensors under one budget.

    Args:
        scores: Tensors of float32 or float64 (one dtype), any shapes, all finite.
        costs: For each tensor the cost of an entry: one number, or a tensor of its shape.
        budget: Total cost that may be kept.

    Returns:
        The masks, deterministic: entries with equal scores are taken in order of position.
    """
    total = sum(_cost_of(cost, s.numel()) for s, cost in zip(scores, costs, strict=True))
    if budget >= total * (1 - _SLACK):
        return Selection([torch.ones_like(s, dtype=torch.bool) for s in scores], -math.inf)
    if budget <= 0:
        return Selection([torch.zeros_like(s, dtype=torch.bool) for s in scores], math.inf)

    boundary, left = _boundary(scores, costs, budget)
    threshold = _from_key(boundary, scores[0].dtype)
    masks = []
    for score, cost in zip(scores, costs, strict=True):
        mask = (score > threshold).contiguous()
        left = _take_ties(mask, score == threshold, cost, left)
        masks.append(mask)
    return Selection(masks, threshold)


def threshold_of(scores: Sequence[Tensor], costs: Sequence[float | Tensor], budget: float) -> float:
    """Return only the threshold of `select`; -inf if everything fits."""
    total = sum(_cost_of(cost, s.numel()) for s, cost in zip(scores, costs, strict=True))
    if budget >= total * (1 - _SLACK):
        return -math.inf
    return _from_key(_boundary(scores, costs, budget)[0], scores[0].dtype)


def select_rows(scores: Tensor, kept: int) -> Tensor:
    """Mark the `kept` highest scores of each row, ties by position.

    Args:
        scores: Shape (rows, m).
        kept: Entries to keep in each row.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, order[:, :kept], True)


def unit_values(values: Tensor, costs: Tensor | None) -> Tensor:
    """Return values / costs in float32 or float64, without negative zeros."""
    wide = values if values.dtype == torch.float64 else values.float()
    return wide + 0.0 if costs is None else wide / costs.to(wide.dtype) + 0.0


def check_request(values: Tensor, budget: float, costs: Tensor | None) -> None:
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
    total = values.numel() if costs is None else _cost_of(costs, values.numel())
    if not 0 <= budget <= total * (1 + _SLACK):
        raise BudgetError(f"budget={budget} must lie between 0 and the total cost {total:g}.")


def _cost_of(cost: float | Tensor, count: int) -> float:
    return float(cost.sum(dtype=torch.float64)) if isinstance(cost, Tensor) else cost * count


def _boundary(
    scores: Sequence[Tensor], costs: Sequence[float | Tensor], budget: float
) -> tuple[int, float]:
    """Return the key of the boundary entry and the budget left for the entries that tie with it.

    Digit by digit from the top: a histogram of the next bits over the entries that share the
    boundary's leading bits says which digit the boundary has.
    """
    keys = [_to_key(s.flatten()) for s in scores]
    flat_costs = [c.flatten() if isinstance(c, Tensor) else c for c in costs]
    shift = 8 * keys[0].element_size()
    boundary = 0
    for level, bits in enumerate(_DIGITS[keys[0].element_size()]):
        shift -= bits
        bins = 1 << bits
        histogram = torch.zeros(bins, dtype=torch.float64, device=keys[0].device)
        for key, cost in zip(keys, flat_costs, strict=True):
            # The top digit carries the sign: shift it up to count from zero.
            digit = (key >> shift) + bins // 2 if level == 0 else (key >> shift) & (bins - 1)
            histogram += _histogram(digit, cost, bins)
        # On the CPU: one read-back a digit, and no order of summation that varies on a GPU.
        from_top = histogram.cpu().flip(0).cumsum(0)
        # The first digit, from the top, at which the budget is reached.
        place = int(torch.searchsorted(from_top, budget * (1 - _SLACK)).clamp_(max=bins - 1))
        budget -= float(from_top[place - 1]) if place > 0 else 0.0
        digit_value = bins - 1 - place
        boundary = (boundary << bits) + digit_value - (bins // 2 if level == 0 else 0)
        if shift:
            same = [(key >> shift) == boundary for key in keys]
            keys = [key[pick] for key, pick in zip(keys, same, strict=True)]
            flat_costs = [
                c[pick] if isinstance(c, Tensor) else c
                for c, pick in zip(flat_costs, same, strict=True)
            ]
    return boundary, budget


def _histogram(digit: Tensor, cost: float | Tensor, bins: int) -> Tensor:
    if isinstance(cost, Tensor):
        return torch.bincount(digit, weights=cost.double(), minlength=bins)
    return torch.bincount(digit, minlength=bins) * float(cost)


def _take_ties(mask: Tensor, ties: Tensor, cost: float | Tensor, left: float) -> float:
    """Add to `mask` the first tied entries that fit; return the budget left, 0 once one did not."""
    count = int(torch.count_nonzero(ties))
    if count == 0:
        return left
    if isinstance(cost, Tensor):
        spent = cost[ties].double().cumsum(0)
        fitting = int(torch.count_nonzero(spent <= left * (1 + _SLACK)))
        used = float(spent[fitting - 1]) if fitting else 0.0
    else:
        fitting = min(count, math.floor(left / cost * (1 + _SLACK)))
        used = cost * fitting
    if fitting == count:
        mask |= ties
        return left - used
    positions = ties.flatten().nonzero()[:fitting, 0]
    mask.view(-1)[positions] = True
    return 0.0


def _to_key(score: Tensor) -> Tensor:
    """Map floats to signed integers in the same order (negative floats order backwards)."""
    integer, top = (torch.int64, 63) if score.dtype == torch.float64 else (torch.int32, 31)
    bits = score.view(integer)
    return bits ^ ((bits >> top) & torch.iinfo(integer).max)


def _from_key(key: int, dtype: torch.dtype) -> float:
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    bits = key if key >= 0 else key ^ torch.iinfo(integer).max
    return float(torch.tensor(bits, dtype=integer).view(dtype))
