"""`freeze`: fine-tunes an already sparse model without losing its zeros."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from spartan.budgets.budget import Budget
from spartan.errors import SpartanError
from spartan.methods.masking.fixed import Fixed
from spartan.sparsifier.sparsifier import Sparsifier
from spartan.weights.prunable import NameFilter, Prunable, find_prunable

# A padding row of an embedding or a zero by chance are no sparsity.
_FEW = 0.05


def freeze(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    include: NameFilter | None = None,
    exclude: NameFilter | None = None,
) -> Sparsifier:
    """Hold the zeros of an already sparse model while it is fine-tuned.

    Matrices of nothing but zeros are left out, with a warning: new heads and adapters begin so.

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
    kept = {w.name: w.kept for w in weights}
    fresh = [w.name for w in weights if kept[w.name] == 0]
    held = {w.name: kept[w.name] / w.numel for w in weights if kept[w.name]}
    if all(density == 1.0 for density in held.values()):
        raise SpartanError("None of the model's prunable weights has a zero to hold.")
    if fresh:
        warnings.warn(
            f"{', '.join(map(repr, fresh))} holds nothing but zeros: it is left out, and learns.",
            stacklevel=2,
        )
    elsewhere = _sparse_elsewhere(model, weights, include, exclude)
    if elsewhere:
        warnings.warn(
            f"There are zeros in {', '.join(elsewhere)}, which is not pruned by default: they are "
            "not held. Name it in include= to hold them.",
            stacklevel=2,
        )
    return Sparsifier(
        model, optimizer, Fixed(), Budget(allocation=held), None,
        include=[*held], exclude=None, checkpoint_with=None,  # zeros of the model say everything
    )  # fmt: skip


def _sparse_elsewhere(
    model: nn.Module,
    weights: Sequence[Prunable],
    include: NameFilter | None,
    exclude: NameFilter | None,
) -> list[str]:
    """Return the names of sparse matrices that nobody decided to leave out."""
    if include is not None or exclude is not None:
        return []
    known = {weight.parameter for weight in weights}
    return [
        repr(name)
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and parameter not in known and _is_sparse(parameter)
    ]


def _is_sparse(parameter: nn.Parameter) -> bool:
    zeros = parameter.numel() - int(torch.count_nonzero(parameter.detach()))
    return _FEW * parameter.numel() < zeros < parameter.numel()
