"""`StepHooks`: the last hook before an optimizer moves, and the first after it has moved."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

StepHook = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], Any]


# One hook of the process tells all, and stays: hooks that come and go while torch walks through
# them, as garbage is collected, would end the step.
_every: weakref.WeakSet[StepHooks] = weakref.WeakSet()
_lasting: set[StepHooks] = set()
_registered: list[RemovableHandle] = []


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _tell_all(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for hooks in [*_every]:
        hooks.arrive(optimizer)


class StepHooks:
    """Hooks around the steps of optimizers, inside of all hooks of others.

    Whatever other hooks do (saving, averaging, clipping, in whatever order they were registered),
    they do before the one and after the other. Optimizers are met when they step, those given
    earlier too.

    Args:
        meet: Called when any optimizer of the process begins a step; whether to hook it.
        before: A hook before steps.
        after: A hook after steps.
        lasting: Whether the hooks stay while nobody else refers to them. Else they go when the
            optimizers go on which they are.
    """

    def __init__(
        self, meet: Callable[[Optimizer], bool], before: StepHook, after: StepHook, lasting: bool
    ) -> None:
        self._meet, self._before, self._after = meet, before, after
        self._handles: weakref.WeakKeyDictionary[
            Optimizer, tuple[RemovableHandle, RemovableHandle]
        ] = weakref.WeakKeyDictionary()
        if not _registered:
            _registered.append(register_optimizer_step_pre_hook(_tell_all))
        _every.add(self)
        if lasting:
            _lasting.add(self)

    def arrive(self, optimizer: Optimizer) -> None:
        """Take note that an optimizer begins a step; its own hooks are called after this."""
        if self._meet(optimizer):
            self.put_on(optimizer)

    def put_on(self, optimizer: Optimizer) -> None:
        """Hook the steps of an optimizer, innermost."""
        if optimizer not in self._handles:
            self._handles[optimizer] = (
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            )
        before, after = self._handles[optimizer]
        earlier: Any = optimizer._optimizer_step_pre_hooks  # ordered dicts, by the ids of handles
        later: Any = optimizer._optimizer_step_post_hooks
        if next(reversed(earlier)) != before.id:
            earlier.move_to_end(before.id)
        if next(iter(later)) != after.id:
            later.move_to_end(after.id, last=False)

    def remove(self) -> None:
        """Take all hooks away; from within a hook they stay where they are, and do nothing."""
        _every.discard(self)
        _lasting.discard(self)
        if _frame_of_a_step() is None:
            for handles in self._handles.values():
                for handle in handles:
                    handle.remove()
        self._handles.clear()


def _frame_of_a_step() -> FrameType | None:
    """Return the innermost frame on the stack in which torch calls the hooks of a step."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != "torch.optim.optimizer":
        frame = frame.f_back
    return frame


class RunningStep:
    """A step that has begun. Made by a hook before it.

    Attributes:
        optimizer: Whose step it is.
        inner: How many steps of the same optimizer have begun within: `super().step()` calls hooks.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.inner = 0
        self._frame = _frame_of_a_step() or sys._getframe(1)
        self._thread = threading.get_ident()

    @property
    def alive(self) -> bool:
        """Whether the step is being done still: not broken off by an exception."""
        frame = sys._current_frames().get(self._thread)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None
