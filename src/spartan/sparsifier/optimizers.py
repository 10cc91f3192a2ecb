"""What is read from torch optimizers: parameters, closures, loss scales, skipped steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from spartan.errors import StateError
from spartan.weights.prunable import Prunable


def wrap_closure(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wrap: Callable[[Callable[[], Any]], Callable[[], Any]],
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Replace the closure among the arguments of `optimizer.step(optimizer, closure)`."""
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": wrap(kwargs["closure"])}, True
    if len(args) > 1 and callable(args[1]):
        return (args[0], wrap(args[1]), *args[2:]), kwargs, True
    return args, kwargs, False


def skips_step(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer under a GradScaler skips this step inside its kernel."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def loss_scale(optimizer: Optimizer) -> float:
    """Return what a GradScaler leaves to a fused optimizer to divide its gradients by; else 1."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def parameters_of(optimizer: Optimizer) -> set[int]:
    """Return the ids of the parameters that an optimizer steps now."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def check_optimizers(
    optimizers: Sequence[Optimizer],
    weights: Sequence[Prunable],
    consequence: str = "masked, but not trained. Exclude them to keep them dense.",
) -> None:
    """Warn of weights that no optimizer steps, and what follows from it.

    Raises:
        StateError: The optimizers step none of the weights.
    """
    if not optimizers:
        return
    anywhere = set().union(*map(parameters_of, optimizers))
    missing = [w.name for w in weights if id(w.parameter) not in anywhere]
    if len(missing) == len(weights):
        raise StateError(
            "The optimizer steps no prunable weight: give the one that trains the model, made "
            "from its present parameters (and so made after always_sparse.convert, which replaces "
            "weights)."
        )
    if missing:
        warnings.warn(
            f"No optimizer steps {', '.join(map(repr, missing))}: {consequence}",
            stacklevel=4,
        )
