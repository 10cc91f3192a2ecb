"""Compares a changed model with its original: copies, runs on an example, relative errors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from spartan.always_sparse.conversion import to_dense
from spartan.copies import copy_model
from spartan.errors import DeployError
from spartan.example_inputs import run_on, tensors_of

# Relative error of outputs at which a changed model is another: float32 sums in another order stay
# far below it.
TOLERANCE = 1e-5


def dense_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy, in which always-sparse layers are dense.

    Raises:
        DeployError: The model cannot be copied.
    """
    return to_dense(copy_model(model, DeployError))


def require_layers(model: nn.Module, what: str) -> None:
    """Refuse models whose layers cannot be looked at.

    Args:
        model: The model.
        what: What cannot be done to its layers, and the way on.

    Raises:
        DeployError: It is scripted or traced, or has lazy layers.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise DeployError(f"A scripted or traced model has no layers that can be {what}.")
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise DeployError("The model has lazy layers without weights yet: run it once first.")


def run_on_example(model: nn.Module, example_input: Any, what: str = "model") -> Any:
    """Return a model's output on an example input, which stays as it is.

    Raises:
        DeployError: The model fails; `what` says which it is.
    """
    try:
        return run_on(model, copy.deepcopy(example_input))  # the model may write into it
    except Exception as error:
        raise DeployError(
            f"The {what} does not run on the example input: {type(error).__name__}: {error}"
        ) from error


def relative_error(result: Any, reference: Any) -> float:
    """Return the largest relative difference, in norm, of the tensors in two outputs.

    Of integers and booleans, the share that differs. Infinite where shapes, dtypes, numbers of
    tensors or infinite entries differ.
    """
    ours, theirs = list(tensors_of(result)), list(tensors_of(reference))
    worst = 0.0 if len(ours) == len(theirs) else float("inf")
    for a, b in zip(ours, theirs, strict=False):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if b.is_complex():
            a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
        if not b.is_floating_point():
            worst = max(worst, float((a != b).double().mean()) if b.numel() else 0.0)
            continue
        finite = b.isfinite()
        if not torch.equal(a.isfinite(), finite):
            return float("inf")
        wanted = b[finite].double()
        error = (a[finite].double() - wanted).norm() / wanted.norm().clamp_min(1e-30)
        worst = max(worst, float(error))
    return worst
