"""What a hook must know of an optimizer's step: its closure, a hidden skip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


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
