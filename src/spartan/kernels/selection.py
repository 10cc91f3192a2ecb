"""Exact selection without a sort: where, in the order of the scores, a budget is used up.

Two histograms find the score at the boundary: one of the upper halves of the scores' bits, which
order like the scores, one of the lower halves of those that share the boundary's upper half. The
native version first looks among the few entries inside a bracket around the last threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spartan.kernels.scores import Scores, chunk_size

_DIGIT = 16
_BINS = 1 << _DIGIT
# Kept costs are compared with this relative slack, so that a sum such as 3 x 0.1 still fits 0.3.
SLACK = 1e-12


@dataclass(frozen=True)
class Cut:
    """Which entries are kept: a prefix of the order by decreasing score, then by position.

    Attributes:
        threshold: Entries with a larger score are kept. -inf keeps all, inf none.
        stops: For each tensor: of the entries whose score is the threshold, those at flat
            positions before this are kept.
    """

    threshold: float
    stops: list[int]


def trivial_cut(scores: Scores, budget: float) -> Cut | None:
    """Return the cut of a budget that keeps everything or nothing, else None."""
    if budget >= scores.total * (1 - SLACK):
        return Cut(-math.inf, scores.numels)
    return Cut(math.inf, [0] * len(scores.tensors)) if budget <= 0 else None


def boundary(scores: Scores, budget: float) -> Tensor:
    """Return threshold, budget left for the entries that tie with it, and what all those cost.

    Stays on the device: nothing is read back.

    Returns:
        Three float64 numbers.
    """
    bits = torch.finfo(scores.dtype).bits
    spent = torch.zeros((), dtype=torch.float64, device=scores.device)
    prefix: Tensor | None = None
    ties = spent
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        from_top = _histogram(scores, shift, prefix).flip(0).cumsum(0)
        # The first digit, from the top, at which the budget is reached.
        wanted = torch.stack((budget * (1 - SLACK) - spent, from_top[-1]))
        place = torch.searchsorted(from_top, wanted).amin()
        below = torch.where(place > 0, from_top.take((place - 1).clamp_(min=0)), 0.0)
        spent, ties = spent + below, from_top.take(place) - below
        digit = _BINS - 1 - place
        prefix = digit - _BINS // 2 if prefix is None else (prefix << _DIGIT) + digit
    assert prefix is not None
    return torch.stack((_from_key(prefix, scores.dtype), budget - spent, ties))


def stops_of(scores: Scores, threshold: float, left: float, ties: float) -> list[int]:
    """Distribute the budget left over the entries at the threshold, by position."""
    if ties <= left * (1 + SLACK):
        return scores.numels
    stops = [0] * len(scores.tensors)
    for i, (x, cost) in enumerate(zip(scores.tensors, scores.costs, strict=True)):
        size = chunk_size(x, x.numel())
        parts = x.flatten().split(size)
        each = cost.flatten().split(size) if isinstance(cost, Tensor) else [cost] * len(parts)
        for part, c in zip(parts, each, strict=True):
            tied = (scores.of(part, i) == threshold).nonzero()[:, 0]
            costs = c[tied] if isinstance(c, Tensor) else torch.full(tied.shape, c)
            spent = costs.to(tied.device, torch.float64).cumsum(0)
            fitting = int(torch.count_nonzero(spent <= left * (1 + SLACK)))
            if fitting < len(tied):
                stops[i] += int(tied[fitting])
                return stops
            left -= float(spent[-1]) if fitting else 0.0
            stops[i] += part.numel()
    return stops


def masks_of(scores: Scores, cut: Cut) -> list[Tensor]:
    """Return the boolean mask of each tensor, True where kept."""
    return [
        kept(scores.of(x, i), cut.threshold, stop)
        for i, (x, stop) in enumerate(zip(scores.tensors, cut.stops, strict=True))
    ]


def kept(u: Tensor, threshold: float, stop: int) -> Tensor:
    """Return which scores are kept, for the `stop` of their tensor."""
    if stop >= u.numel():
        return u >= threshold
    mask = u > threshold
    if stop > 0:
        tied = torch.zeros_like(mask).flatten()
        tied[:stop] = u.flatten()[:stop] == threshold
        mask |= tied.view_as(mask)
    return mask


def _histogram(scores: Scores, shift: int, prefix: Tensor | None) -> Tensor:
    """Return the cost per digit of the keys that begin with `prefix`, float64."""
    total = torch.zeros(_BINS, dtype=torch.float64, device=scores.device)
    waits = scores.device.type == "cpu"
    for u, cost in scores.pieces():
        key = _to_key(u)
        digit = (key >> shift) & (_BINS - 1)
        if prefix is None:
            # The top digit carries the sign: shift it up to count from zero.
            total += _count(digit ^ (_BINS // 2), None, cost, waits)
        else:
            total += _count(digit, (key >> (shift + _DIGIT)) == prefix, cost, waits)
    return total


def _count(digit: Tensor, hit: Tensor | None, cost: float | Tensor, waits: bool) -> Tensor:
    """Return the cost of each digit over the entries that are hit.

    Where it costs nothing to wait for a result, only those entries are counted.
    """
    weights = cost.double() if isinstance(cost, Tensor) else None
    if waits:
        if hit is not None:
            digit, weights = digit[hit], None if weights is None else weights[hit]
        counts = torch.bincount(digit, weights, minlength=_BINS)
    else:
        if weights is None:
            weights = torch.ones_like(digit) if hit is None else hit.long()
        elif hit is not None:
            weights = weights * hit
        counts = torch.zeros(_BINS, dtype=weights.dtype, device=digit.device)
        counts.index_add_(0, digit, weights)
    return counts.double() if isinstance(cost, Tensor) else counts * float(cost)


def _to_key(score: Tensor) -> Tensor:
    """Map floats to signed integers in the same order (negative floats order backwards)."""
    integer, top = (torch.int64, 63) if score.dtype == torch.float64 else (torch.int32, 31)
    bits = score.view(integer)
    return bits ^ ((bits >> top) & torch.iinfo(integer).max)


def _from_key(key: Tensor, dtype: torch.dtype) -> Tensor:
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    largest = torch.iinfo(integer).max
    bits = torch.where(key < 0, key ^ largest, key).to(integer)
    return bits.view(dtype).double()
