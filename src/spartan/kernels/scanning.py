"""The first look at new weights: broken numbers, the hard cutoff and the soft mass.

All requests together read back once from a GPU; and twice more for one whose budget ends among
entries of equal score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spartan.kernels.dispatch import native_for
from spartan.kernels.finiteness import finite, max_magnitude
from spartan.kernels.memory import flat
from spartan.kernels.readback import read_back
from spartan.kernels.scores import Scores, chunk_size
from spartan.kernels.selection import Cutoff, boundary, tie_ends_of, trivial_cutoff
from spartan.kernels.soft import Dual, Mass, mass_on_device, native_mass


@dataclass(frozen=True)
class ScanRequest:
    """What to look for in one group of tensors.

    Attributes:
        scores: The scores that compete.
        budget: Total cost that may be kept.
        bracket: Where the threshold is expected; a wrong guess costs time only.
        dual: If given, the soft mass at this dual variable is wanted too.
        dropped: Whether that is the mass of what is dropped.
        threshold_only: Whether the tie_ends of the cutoff are not wanted.
        counted: Whether the entries above the threshold are to be counted, tensor by tensor.
    """

    scores: Scores
    budget: float
    bracket: tuple[float, float] = (0.0, 0.0)
    dual: Dual | None = None
    dropped: bool = False
    threshold_only: bool = False
    counted: bool = False


@dataclass(frozen=True)
class ScanResult:
    """What was found.

    Attributes:
        finite: Whether all scores are; the rest means nothing if not.
        cutoff: Which entries are kept.
        mass: The soft mass, if it was asked for.
        above: How many entries of each tensor lie above the threshold, if that was asked for.
    """

    finite: bool
    cutoff: Cutoff
    mass: Mass | None
    above: list[int]


def scan(requests: Sequence[ScanRequest]) -> list[ScanResult]:
    """Answer requests; on a GPU with one read-back for all of them, but for ties."""
    answers = [_native(request) for request in requests]
    waiting = [i for i, answer in enumerate(answers) if answer is None]
    if waiting:
        rows = read_back([_on_device(requests[i]) for i in waiting])
        for i, row in zip(waiting, rows, strict=True):
            answers[i] = _read(requests[i], row)
    return [answer for answer in answers if answer is not None]


def _native(request: ScanRequest) -> ScanResult | None:
    scores, dual = request.scores, request.dual
    native, costs = native_for(scores.tensors), scores.plain_costs
    # A part of a group with float64 tensors has scores in float64, whatever its own are.
    if native is None or costs is None or scores.dtype != torch.float32:
        return None
    cutoff = trivial_cutoff(scores, request.budget)
    if cutoff is not None:
        mass = None if dual is None else native_mass(scores, dual, request.dropped)
        return ScanResult(all(finite(scores.tensors)), cutoff, mass, cutoff.tie_ends)
    ok, threshold, tie_ends, above, sums = native.scan(
        tensors=scores.tensors,
        scales=scores.scales,
        costs=costs,
        absolute=scores.absolute,
        budget=request.budget,
        bracket=request.bracket,
        dual=None if dual is None else dual.astuple(),
        dropped=request.dropped,
        counted=request.counted,
        threads=torch.get_num_threads(),
    )
    mass = None if dual is None else Mass(*sums)
    return ScanResult(ok, Cutoff(threshold, list(tie_ends)), mass, list(above))


def _on_device(request: ScanRequest) -> Tensor:
    """Return everything as one row of numbers."""
    scores = request.scores
    counts = len(scores.tensors) if request.counted else 0
    row = torch.zeros(8 + counts, dtype=torch.float64, device=scores.device)
    row[0] = max_magnitude(scores.tensors).amax()
    if trivial_cutoff(scores, request.budget) is None:
        row[1:5] = boundary(scores, request.budget)
        for i in range(counts):
            parts = flat(scores.tensors[i]).split(chunk_size(scores.tensors[i], scores.numels[i]))
            row[8 + i] = torch.stack([(scores.of(x, i) > row[1]).sum() for x in parts]).sum()
    if request.dual is not None:
        row[5:8] = mass_on_device(scores, request.dual, request.dropped)
    return row


def _read(request: ScanRequest, row: list[float]) -> ScanResult:
    largest_entry, threshold, left, ties, number = row[:5]
    ok = math.isfinite(largest_entry)
    cutoff = trivial_cutoff(request.scores, request.budget)
    above = [int(count) for count in row[8:]] if cutoff is None else cutoff.tie_ends
    if cutoff is None:
        tie_ends: list[int] = []
        if ok and not request.threshold_only:
            tie_ends = tie_ends_of(request.scores, request.budget, threshold, left, ties, number)
        cutoff = Cutoff(threshold, tie_ends)
    return ScanResult(ok, cutoff, None if request.dual is None else Mass(*row[5:8]), above)
