"""Checks that the first dimension of calibration data are the samples, as a model sees them.

Samples do not know of each other: in another order they get the same answers, in that order. Tokens
of one sequence do, and so do the time steps of a batch that has them first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from spartan.errors import CalibrationError
from spartan.example_inputs import run_on_copy, tensors_of

_FEW = (2, 3, 5, 7, 11, 13)  # samples that are tried: so many as no other dimension has
# Relative to the largest answer: what other sums in the products of another order may differ by.
_ROUNDING = 1e-3


def check_sample_axis(
    model: nn.Module, shapes: Sequence[torch.Size], take: Callable[[Tensor], Any]
) -> None:
    """Refuse data whose first dimension are not samples to this model.

    Models that answer differently each time, and answers without a dimension of samples, say
    nothing of it.

    Args:
        model: In evaluation mode.
        shapes: Of the tensors that hold the data.
        take: Returns a batch of some samples by their places.

    Raises:
        CalibrationError: Answers depend on what else is in the batch.
    """
    sizes = {size for shape in shapes for size in shape[1:]}
    count = next((n for n in _FEW if n not in sizes), len(_FEW))
    if shapes[0][0] < count:
        return
    there = torch.arange(count)
    order = there.roll(1)
    given, others = _answers_to(model, take(there)), _answers_to(model, take(order))
    second = shapes[0][1] if len(shapes[0]) > 1 else count
    for answer, moved in zip(given, others, strict=False):
        # Answers to samples number them first; where time is first, so do its steps, or the samples
        # that come second then.
        if not answer.dim() or len(answer) not in (count, second) or answer.shape != moved.shape:
            continue
        if not _accounted_for(answer, [moved, *others], count):
            if all(map(_equal, given, _answers_to(model, take(there)))):
                raise CalibrationError(_told(tuple(shapes[0])))
            return  # the model draws its answers


def _answers_to(model: nn.Module, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        output = run_on_copy(model, batch)
    return [tensor.float() for tensor in tensors_of(output) if tensor.is_floating_point()]


def _accounted_for(answer: Tensor, others: list[Tensor], count: int) -> bool:
    """Whether an answer is there again, in the order of the samples if it has them.

    Their dimension may be any, and there may be several, as of what compares samples with each
    other. What is the same for all, or belongs to one sample, is there again as it is.
    """
    where = [i for i, size in enumerate(answer.shape) if size == count]
    ways = (dims for n in range(len(where) + 1) for dims in combinations(where, n))
    rolled = [answer.roll((1,) * len(dims), dims) if dims else answer for dims in ways]
    return any(_equal(one, other) for one in rolled for other in others)


def _equal(a: Tensor, b: Tensor) -> bool:
    scale = a.abs().max().clamp(min=1e-12) if a.numel() else a.new_ones(())
    return a.shape == b.shape and bool(((a - b).abs() <= _ROUNDING * scale).all())


def _told(shape: tuple[int, ...]) -> str:
    return (
        f"The first dimension of calibration data of shape {shape} are no samples to this model: "
        "what it answers to one depends on the others. Put single samples, such as sequences, "
        "together with torch.stack; of batches that have time first, wrap the model so that it "
        "takes and returns samples first."
    )
