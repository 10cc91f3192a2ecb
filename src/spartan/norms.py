"""`recalibrated`: evaluates a model with batch-norm statistics of the weights that it has now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from spartan.errors import CalibrationError
from spartan.example_inputs import run_on


@contextmanager
def recalibrated(model: nn.Module, inputs: Iterable[Any]) -> Iterator[None]:
    """Let batch norms have the statistics of some inputs for a while, to evaluate a model.

    Running means follow the last few dozen steps. While the density of a model falls, or its soft
    masks sharpen, its weights change faster: held-out data then look as if nothing were learned,
    though training goes well. Inside of this the model is in evaluation mode; afterwards
    statistics, modes and everything else are as before.

        with spartan.recalibrated(model, [images for images, _ in first_batches]):
            accuracy = evaluate(model)

    Args:
        model: The model. Without batch norms nothing is computed, and norms that are in evaluation
            mode while the model is in training keep their statistics: they are frozen. Norms that
            synchronise processes need all of these to do it.
        inputs: Batches of training inputs: tensors, or tuples of positional or dicts of keyword
            arguments; some hundred samples are enough.

    Raises:
        CalibrationError: There is no batch.
    """
    modes = {module: module.training for module in model.modules()}
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and module.training >= model.training
    ]
    saved = [([x.clone() for x in norm.buffers(recurse=False)], norm.momentum) for norm in norms]
    model.eval()
    try:
        if norms:
            _measure(model, norms, inputs)
        yield
    finally:
        with torch.no_grad():
            for norm, (buffers, momentum) in zip(norms, saved, strict=True):
                for buffer, kept in zip(norm.buffers(recurse=False), buffers, strict=True):
                    buffer.copy_(kept)
                norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def _measure(model: nn.Module, norms: list[_BatchNorm], inputs: Iterable[Any]) -> None:
    for norm in norms:
        norm.train()
    count = 0
    for batch in inputs:
        count += 1
        for norm in norms:
            norm.momentum = 1 / count  # the plain mean over batches; the first replaces what was
        run_on(model, batch)
    if count == 0:
        raise CalibrationError(
            "recalibrated() was given no batch to measure batch norms on; an iterator gives its "
            "batches once only."
        )
    for norm in norms:
        norm.eval()
