"""`freeze`: fine-tunes an already sparse model without losing its zeros."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from spartan.budgets.budget import Budget
from spartan.errors import SpartanError
from spartan.methods.masking.fixed import Fixed
from spartan.sparsifier.sparsifier import Sparsifier
from spartan.weights.prunable import NameFilter, find_prunable


def freeze(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    include: NameFilter | None = None,
    exclude: NameFilter | None = None,
) -> Sparsifier:
    """Hold the zeros of an already sparse model while it is fine-tuned.

    Args:
        model: A model with exact zeros in some weights.
        optimizer: The optimizer that fine-tunes it; None watches every optimizer of the process
            that steps one of its weights, made before or after.
        include: Which parameters to hold, see `find_prunable`.
        exclude: Which not.

    Returns:
        The sparsifier that holds them. `finalize()` takes its hooks away.

    Raises:
        SpartanError: The model has no zeros to hold.
    """
    weights = find_prunable(model, include, exclude)
    kept = {w.name: int(torch.count_nonzero(w.parameter)) for w in weights}
    sparse = {w.name: kept[w.name] / w.parameter.numel() for w in weights}
    if all(density == 1.0 for density in sparse.values()):
        raise SpartanError("None of the model's prunable weights has a zero to hold.")
    budget = Budget(allocation=sparse)
    return Sparsifier(model, optimizer, Fixed(), budget, None, include=include, exclude=exclude)
