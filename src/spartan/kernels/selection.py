"""`Cutoff`: exact top-k over many tensors by radix histograms, without a sort.

Two histograms find the score at the boundary: one of the upper halves of the scores' bits, which
order like the scores, one of the lower halves of those that share the boundary's upper half. The
native version first looks among the few entries inside a bracket around the last threshold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spartan.kernels.memory import flat, unflat
from spartan.kernels.readback import read_back
from spartan.kernels.scores import Scores, chunk_size

# Two digits make a float32 key, four a float64 one; the bins of a digit are 512 KiB of int64.
_DIGIT = 16
_BINS = 1 << _DIGIT
# Kept costs are compared with this slack, relative to the budget, so that 3 x 0.1 still fits 0.3.
SLACK = 1e-12


@dataclass(frozen=True)
class Cutoff:
    """Which entries are kept: a prefix of the order by decreasing score, then by position.

    Tensors that are held to a floor keep a longer prefix of their own order.

    Attributes:
        threshold: Entries with a larger score are kept. -inf keeps all, inf none.
        tie_ends: For each tensor: of the entries whose score is the threshold, those at positions
            before this, counted in the order of memory, are kept.
        lowered: Thresholds of their own of tensors that are held to a floor, by index.
    """

    threshold: float
    tie_ends: list[int]
    lowered: Mapping[int, float] = field(default_factory=dict)

    def of(self, index: int) -> tuple[float, int]:
        """Return threshold and tie_end of one tensor."""
        return self.lowered.get(index, self.threshold), self.tie_ends[index]


def trivial_cutoff(scores: Scores, budget: float) -> Cutoff | None:
    """Return the cutoff of a budget that keeps everything or nothing, else None."""
    if budget >= scores.total * (1 - SLACK):
        return Cutoff(-math.inf, scores.numels)
    return Cutoff(math.inf, [0] * len(scores.tensors)) if budget <= 0 else None


def boundary(scores: Scores, budget: float) -> Tensor:
    """Return threshold, budget left for the entries that tie with it, their cost and number.

    Entries are counted apart for each distinct cost: integers, so that sums have no order. Stays on
    the device: nothing is read back.

    Returns:
        Four float64 numbers; the last is infinite where every entry has a cost of its own.
    """
    bits = torch.finfo(scores.dtype).bits
    costs = torch.tensor(_distinct(scores), dtype=torch.float64).to(scores.device)[:, None]
    above: Tensor | None = None
    prefix: Tensor | None = None
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        counts = _histogram(scores, shift, prefix)
        above = torch.zeros_like(counts[:, :1]) if above is None else above
        reached = counts.flip(1).cumsum(1) + above
        spent = (costs * reached).sum(0)
        # The first digit, from the top, at which the budget is reached.
        wanted = torch.stack((spent.new_full((), budget * (1 - SLACK)), spent[-1]))
        place = torch.searchsorted(spent.contiguous(), wanted).amin().reshape(1)
        before = reached.index_select(1, (place - 1).clamp_(min=0))
        above = torch.where(place > 0, before, above)
        ties = reached.index_select(1, place) - above
        digit = _BINS - 1 - place
        prefix = digit - _BINS // 2 if prefix is None else (prefix << _DIGIT) + digit
    assert prefix is not None
    assert above is not None
    left = budget - (costs * above).sum()
    number = ties.sum().double() if scores.plain_costs else torch.full_like(left, math.inf)
    rest = torch.stack((left, (costs * ties).sum(), number))
    return torch.cat((_from_key(prefix, scores.dtype), rest))


def tie_ends_of(
    scores: Scores, budget: float, threshold: float, left: float, ties: float, number: float
) -> list[int]:
    """Distribute the budget left over the entries at the threshold, by position.

    Where not all of them fit, two more things are read back: how many each chunk has, and where in
    one chunk they tie_end to fit.
    """
    left += SLACK * budget
    if ties <= left:
        return scores.numels
    if number == 1:
        return [0] * len(scores.tensors)
    costs = scores.plain_costs
    if costs is None:
        return [_tie_end_by_entry(scores, threshold, left)]
    pieces = [
        (i, x)
        for i, tensor in enumerate(scores.tensors)
        for x in flat(tensor).split(chunk_size(tensor, sum(scores.numels)))
    ]
    counts = read_back([(scores.of(x, i) == threshold).sum().reshape(1) for i, x in pieces])
    tie_ends = [0] * len(scores.tensors)
    taken = dict.fromkeys(sorted(set(costs)), 0)
    for (i, x), (count,) in zip(pieces, counts, strict=True):
        spent = sum(cost * number for cost, number in taken.items())
        fitting = max(math.floor((left - spent) / costs[i]), 0)
        if fitting < count:
            tie_ends[i] += int((scores.of(x, i) == threshold).nonzero()[fitting, 0])
            break
        taken[costs[i]] += int(count)
        tie_ends[i] += x.numel()
    return tie_ends


def _tie_end_by_entry(scores: Scores, threshold: float, left: float) -> int:
    """Do so for one tensor whose entries have costs of their own."""
    (x,), (cost,) = scores.tensors, scores.costs
    assert isinstance(cost, Tensor)
    tied = (scores.of(flat(x), 0) == threshold).nonzero()[:, 0]
    fitting = int(torch.count_nonzero(flat(cost)[tied].double().cumsum(0) <= left))
    return int(tied[fitting]) if fitting < len(tied) else x.numel()


def masks_of(scores: Scores, cutoff: Cutoff) -> list[Tensor]:
    """Return the boolean mask of each tensor, True where kept."""
    return [
        unflat(kept(scores.of(flat(x), i), *cutoff.of(i)), x) for i, x in enumerate(scores.tensors)
    ]


def kept(u: Tensor, threshold: float, tie_end: int) -> Tensor:
    """Return which of the flat scores of a tensor are kept, for its tie_end."""
    if tie_end >= u.numel():
        return u >= threshold
    mask = u > threshold
    if tie_end > 0:
        mask[:tie_end] |= u[:tie_end] == threshold
    return mask


def _distinct(scores: Scores) -> list[float]:
    """Return the distinct costs; where every entry has its own, entries are counted by cost."""
    costs = scores.plain_costs
    return [1.0] if costs is None else sorted(set(costs))


def _histogram(scores: Scores, shift: int, prefix: Tensor | None) -> Tensor:
    """Count the digits of the keys that begin with `prefix`, a row for each distinct cost."""
    kinds = {cost: k for k, cost in enumerate(_distinct(scores))}
    counted = torch.int64 if scores.plain_costs is not None else torch.float64
    counts = torch.zeros((len(kinds), _BINS), dtype=counted, device=scores.device)
    waits = scores.device.type == "cpu"
    for u, cost in scores.pieces():
        key = _to_key(u)
        digit = (key >> shift) & (_BINS - 1)
        # The top digit carries the sign: shift it up to count from zero.
        digit = digit ^ (_BINS // 2) if prefix is None else digit
        hit = None if prefix is None else (key >> (shift + _DIGIT)) == prefix
        weights = cost.double() if isinstance(cost, Tensor) else None
        counts[0 if isinstance(cost, Tensor) else kinds[cost]] += _count(digit, hit, weights, waits)
    return counts


def _count(digit: Tensor, hit: Tensor | None, weights: Tensor | None, waits: bool) -> Tensor:
    """Return how many entries that are hit have each digit, or the sum of their weights.

    Where it costs nothing to wait for a result, only those entries are looked at.
    """
    if waits:
        if hit is not None:
            digit, weights = digit[hit], None if weights is None else weights[hit]
        return torch.bincount(digit, weights, minlength=_BINS)
    if weights is None:
        weights = torch.ones_like(digit, dtype=torch.int64) if hit is None else hit.long()
    elif hit is not None:
        weights = weights * hit
    counts = torch.zeros(_BINS, dtype=weights.dtype, device=digit.device)
    return counts.index_add_(0, digit, weights)


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
