"""What is read from torch optimizers: parameters, closures, loss scales, skipped steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
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


def changes_nothing(optimizer: Optimizer) -> bool:
    """Whether a step is one of those by which tools fill an optimizer's state before saving it.

    They set every learning rate and every gradient to exactly 0.
    """
    for group in optimizer.param_groups:
        rate = group.get("lr")
        known = isinstance(rate, float | int) or (isinstance(rate, Tensor) and rate.is_cpu)
        if not known or rate != 0:
            return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return not any(grad is not None and bool(grad.any()) for grad in grads)


def are_one(first: Optimizer, second: Optimizer) -> bool:
    """Whether two optimizers are the same one, or one wraps the other."""
    if first is second:
        return True
    for outer, inner in ((first, second), (second, first)):
        if any(value is inner for value in vars(outer).values()):
            return True
    groups = set(map(id, first.param_groups))
    return any(id(group) in groups for group in second.param_groups)


def nested(*optimizers: Optimizer) -> list[Optimizer]:
    """Return optimizers and those that they wrap, which may keep states of their own, each once."""
    found: list[Optimizer] = []
    for optimizer in optimizers:
        if all(optimizer is not one for one in found):
            inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
            found += [one for one in nested(*inner) if all(one is not known for known in found)]
            found.append(optimizer)
    return found


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that takes the steps of a handle that a trainer has put around it.

    Handles pass for an optimizer and hand on to another one, without the hooks of torch.
    """
    inner = [value for value in vars(optimizer).values() if isinstance(value, Optimizer)]
    hooked = getattr(type(optimizer).step, "hooked", False)
    return unwrapped(inner[0]) if len(inner) == 1 and not hooked else optimizer


def check_optimizers(
    optimizers: Sequence[Optimizer],
    weights: Sequence[Prunable],
    consequence: str = "masked as it is. Exclude it to keep it dense.",
    trains: bool = True,
) -> None:
    """Warn of weights that no optimizer steps, and what follows from it.

    Args:
        optimizers: Those given; none for all there will be.
        weights: The weights.
        consequence: What follows.
        trains: Whether weights are meant to be trained.

    Raises:
        StateError: The optimizers step none of the weights.
    """
    anywhere = set().union(*map(parameters_of, optimizers))
    unstepped = [w.name for w in weights if optimizers and id(w.parameter) not in anywhere]
    frozen = [w.name for w in weights if not w.parameter.requires_grad and w.name not in unstepped]
    if trains and optimizers and len(unstepped) + len(frozen) == len(weights):
        raise StateError(
            "The optimizer steps no prunable weight that requires a gradient: give the one that "
            "trains the model, made from its present parameters (and so made after "
            "always_sparse.convert, which replaces weights). Factors of LoRA are prunable only "
            "where include= names them."
        )
    for names, why in ((unstepped, "No optimizer steps"), (frozen, "No gradient is required of")):
        if names and trains:
            warnings.warn(f"{why} {', '.join(map(repr, names))}: {consequence}", stacklevel=4)
