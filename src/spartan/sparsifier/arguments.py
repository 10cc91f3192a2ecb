"""Checks and converts the arguments of `Sparsifier(...)`; one sentence for each mistake."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from numbers import Integral

from torch import nn
from torch.optim import Optimizer

from spartan.errors import PatternError, PrunableError, ScheduleError, StateError
from spartan.registry import Registered
from spartan.sparsifier.optimizers import unwrapped
from spartan.weights.patterns import Pattern, Unstructured, parse_pattern


def check_model(model: nn.Module) -> None:
    """Raise `PrunableError` unless this is a module."""
    if not isinstance(model, nn.Module):
        raise PrunableError(f"model={model!r} is no torch.nn.Module: give the model itself.")


def check_carrier(checkpoint_with: object) -> None:
    """Raise `StateError` unless this says what carries the state."""
    if checkpoint_with not in (None, "optimizer"):
        raise StateError(
            f"checkpoint_with={checkpoint_with!r}; known: 'optimizer', in whose state dict the "
            "sparsifier's rides, or None."
        )


def as_optimizers(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """Return one optimizer, several or none as a list.

    Raises:
        StateError: Something else is given.
    """
    if optimizer is None:
        return []
    if isinstance(optimizer, Optimizer) or not isinstance(optimizer, Iterable):
        return [_as_optimizer(optimizer)]
    return [_as_optimizer(one) for one in optimizer]


def _as_optimizer(given: object) -> Optimizer:
    """Return an optimizer, or that of a handle around it, which has it as `.optimizer`."""
    if not isinstance(given, Optimizer):
        inner = getattr(given, "optimizer", None)
        if not isinstance(inner, Optimizer):
            raise StateError(
                f"optimizer= holds a {type(given).__name__}: give the torch.optim.Optimizer that "
                "steps the model, several of them in a list, or None for every one that does."
            )
        given = inner
    optimizer = unwrapped(given)
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise StateError(
            f"optimizer= holds a {type(optimizer).__name__} whose steps cannot be hooked, for "
            "torch.optim.Optimizer.__init__ was never called: give the optimizer that it wraps."
        )
    return optimizer


def as_pattern(pattern: Pattern | str | None) -> Pattern:
    """Return a pattern as it is, or make it from its name.

    Raises:
        PatternError: It is neither.
    """
    if pattern is None:
        return Unstructured()
    if isinstance(pattern, str):
        return parse_pattern(pattern)
    if isinstance(pattern, Pattern):
        return pattern
    if inspect.isclass(pattern):
        raise PatternError(
            f"pattern={pattern.__name__} is a class: write pattern=spartan.{pattern.__name__}(…)."
        )
    raise PatternError(
        f"pattern={pattern!r} is no pattern: write spartan.Block(4, 4), spartan.NM(2, 4), "
        "spartan.Channel(), or a name such as '2:4'."
    )


def check_steps(total_steps: int | None, method: Registered) -> int | None:
    """Return the number of steps, as a plain integer.

    Raises:
        ScheduleError: A method cannot run for so many steps.
    """
    if total_steps is None:
        if method.scheduled:
            raise ScheduleError(f"The method {method.name!r} needs total_steps= for its schedule.")
        return None
    if isinstance(total_steps, bool) or not isinstance(total_steps, Integral):
        raise ScheduleError(f"total_steps={total_steps!r} must be a whole number of steps.")
    if total_steps < 1:
        raise ScheduleError(f"total_steps={total_steps} must be at least 1.")
    return int(total_steps)
