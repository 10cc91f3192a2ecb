"""Checks that the first dimension of calibration data are the samples, as a model sees them.

Samples do not know of each other: in another order they get the same answers, in that order. Tokens
of one sequence do, and so do the time steps of a batch that has them first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    for answer, moved in zip(given, others, strict=False):
        if answer.dim() and not _follows(answer, moved, order, shapes[0]):
            if all(map(_equal, given, _answers_to(model, take(there)))):
                raise CalibrationError(_told(tuple(shapes[0])))
            return  # the model draws its answers


def _answers_to(model: nn.Module, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        output = run_on_copy(model, batch)
    return [tensor.float() for tensor in tensors_of(output) if tensor.is_floating_point()]


def _follows(answer: Tensor, moved: Tensor, order: Tensor, shape: torch.Size) -> bool:
    """Whether answers to samples in another order are the same ones in that order."""
    if len(answer) == len(order):
        return _equal(answer[order.to(answer.device)], moved)
    # As many answers as there are entries in the second dimension: that one are the samples.
    return len(shape) < 2 or len(answer) != shape[1]


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
