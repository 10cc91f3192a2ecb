"""`OptimizerSteps`: the training steps of a run: when one begins, is complete, and is one too many.

Optimizers call each other, come and go. What counts as one step:

* An optimizer that wraps another (Lookahead, SAM, sharding) and the wrapped one are one: the outer
  step is the step.
* Of several given optimizers the last of the list completes a step. Where none was given, a step is
  complete when every weight that has a gradient was stepped.
* A step with learning rate 0 and gradients of exactly 0 is none: tools that save optimizers do
  such steps to fill their states.
* An optimizer made anew takes the place of the given one that stepped the same weights. Another one
  is refused: it would move weights past the masks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from spartan.errors import NonFiniteError, StateError, some_of
from spartan.kernels import finite
from spartan.sparsifier.optimizers import are_one, changes_nothing, parameters_of
from spartan.sparsifier.step_hooks import RunningStep, StepHook, StepHooks
from spartan.weights.prunable import Prunable

# Critics are stepped five times as often as what they criticise, as a rule, and rarely more.
_MANY_TURNS = 10
_MOST_SKIPPED = 5  # in a row: a GradScaler may skip one of two optimizers a few times


class Companion(Protocol):
    """What goes along with the steps."""

    def arrive(self) -> None:
        """Called before each step."""

    def leave(self) -> None:
        """Called when the run is over."""


class OptimizerSteps:
    """The training steps in which optimizers step some weights.

    Args:
        optimizers: Those to hook; none hooks every optimizer that steps one of the weights.
        total: Steps of the whole run; None where there is no schedule.
        weights: The weights.

    Attributes:
        done: Steps completed.
        optimizers: Those given, and those that took their place.
        running: The step that has begun and not ended.
        over: Whether the run has ended.
        companion: Told of each step before it, and of the end of the run.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], total: int | None, weights: Sequence[Prunable]
    ) -> None:
        self.optimizers = list(optimizers)
        self.total = total
        self.done = 0
        self.running: RunningStep | None = None
        self.over = False
        self.companion: Companion | None = None
        self._weights = weights
        # Others that may keep something for the weights: wrappers, those whose place was taken, and
        # all that stepped where none was given.
        self._met: list[Optimizer] = []
        self._stepped: set[int] = set()  # weights stepped since the last step was complete
        self._whole: set[int] = set()  # weights stepped in complete steps
        self._skipped = 0  # incomplete steps in a row
        self._uncounted = 0  # optimizers' steps since the last one that completed one
        self._said_surplus = False

    @property
    def horizon(self) -> int:
        """Steps of the whole run; without a schedule, more than there will ever be."""
        return self.total if self.total is not None else 2**62

    @property
    def surplus(self) -> bool:
        """Whether the step that is done or follows now is more than the run was to have."""
        return self.total is not None and self.done >= self.total

    @property
    def left(self) -> range:
        """The steps that are not done yet; none without a schedule."""
        return range(self.done + 1, (self.total or 0) + 1)

    @property
    def is_within_one(self) -> bool:
        """Whether a step is being done now: begun, not ended, and not broken off."""
        return self.running is not None and self.running.alive

    @property
    def steppers(self) -> list[Optimizer]:
        """The optimizers that step the weights, as far as they are known."""
        return list(dict.fromkeys([*self.optimizers, *self._met]))

    def hook(
        self,
        before: StepHook,
        after: StepHook,
        accept: Callable[[Optimizer], None],
        other: Callable[[Optimizer], None],
    ) -> None:
        """Call functions around every step, until `stop`.

        Args:
            before: Before an optimizer moves weights.
            after: After it.
            accept: Called with an optimizer that was not given, before its first step; may raise.
            other: Called before the step of an optimizer that steps none of the weights.
        """
        self._before, self._after = before, after
        self._accept, self._other = accept, other
        self._hooks = StepHooks(self._meet, self._begin, self._end, lasting=not self.optimizers)
        for optimizer in self.optimizers:
            self._hooks.put_on(optimizer)

    def stop(self) -> None:
        """Take the hooks away: the run is over."""
        self.over = True
        self._hooks.remove()
        if self.companion is not None:
            self.companion.leave()

    def resume(self, step: int) -> None:
        """Go on after a step, as if nothing had been done since it."""
        self.done = step
        self._stepped.clear()
        self._skipped = self._uncounted = 0

    def note_handles(self, given: object) -> None:
        """Take note of handles around the optimizers, which may keep something for weights too."""
        for one in given if isinstance(given, Iterable) else [given]:
            if isinstance(one, Optimizer) and one not in self.optimizers:
                self._met.append(one)

    def weights_of(self, optimizer: Optimizer) -> list[Prunable]:
        """Return the weights an optimizer steps now; its parameter groups may have grown."""
        stepped = parameters_of(optimizer)
        return [weight for weight in self._weights if id(weight.parameter) in stepped]

    def completed_by(self, optimizer: Optimizer) -> bool:
        """Say whether a step is complete now that this optimizer has stepped."""
        if self.total is None:
            return True
        if self.optimizers:
            stepping = [one for one in self.optimizers if self.weights_of(one)]
            completes = are_one(optimizer, stepping[-1])
            self._uncounted = 0 if completes else self._uncounted + 1
            if self._uncounted == _MANY_TURNS:
                warnings.warn(
                    f"After step {self.done} there were {_MANY_TURNS} steps without one of the "
                    f"{type(stepping[-1]).__name__} that is last in the list of optimizers, and "
                    "completes a step: they are not counted, and masks do not move.",
                    stacklevel=5,
                )
            return completes
        self._stepped |= set(map(id, self.weights_of(optimizer)))
        if any(_waits(w) for w in self._weights if id(w) not in self._stepped):
            return False
        self._whole |= self._stepped
        self._stepped.clear()
        self._skipped = 0
        return True

    def require_finite_gradients(self, weights: Sequence[Prunable], optimizer: Optimizer) -> None:
        """Refuse a step in which a gradient is not finite, of these weights or of others.

        Raises:
            NonFiniteError: One is NaN or infinite; nothing has changed yet.
            StateError: A gradient of these weights is sparse.
        """
        grads = {w.name: w.parameter.grad for w in weights if w.parameter.grad is not None}
        for name, grad in grads.items():
            if grad.layout != torch.strided:
                raise StateError(
                    f"The gradient of {name!r} is {grad.layout}: masks need all of it; make the "
                    "embedding with sparse=False, or exclude it."
                )
        named = [(repr(name), grad) for name, grad in grads.items()]
        named += _other_gradients(optimizer, set(map(id, grads.values())))
        # A GPU is not waited for: a broken gradient shows in the weights after the step.
        if any(grad.is_cuda for _, grad in named):
            return
        for (name, _), ok in zip(named, finite([grad for _, grad in named]), strict=True):
            if not ok:
                raise NonFiniteError(
                    f"The gradient of {name} is NaN or infinite at step {self.done + 1}; weights "
                    "and masks are unchanged. Lower the learning rate, clip gradients, or use a "
                    "GradScaler with float16."
                )

    # Around a step ------------------------------------------------------------------------------

    def _meet(self, optimizer: Optimizer) -> bool:
        """Look at an optimizer that begins a step, and say whether it is to be hooked."""
        weights = self.weights_of(optimizer)
        if not weights:
            self._other(optimizer)
            return False
        if self.is_within_one or changes_nothing(optimizer):
            return True
        if self.optimizers and not any(are_one(optimizer, one) for one in self.optimizers):
            self._replace(optimizer, weights)
        elif optimizer not in self.steppers:
            self._accept(optimizer)
            self._met.append(optimizer)
        return True

    def _replace(self, optimizer: Optimizer, weights: Sequence[Prunable]) -> None:
        """Let an optimizer take the place of the given ones whose weights it steps, all of them."""
        stepped = set(map(id, weights))
        parts = [set(map(id, self.weights_of(one))) for one in self.optimizers]
        covered = [i for i, part in enumerate(parts) if part and part <= stepped]
        touched = [i for i, part in enumerate(parts) if part & stepped]
        kind, names = type(optimizer).__name__, some_of(weight.name for weight in weights)
        if not covered or touched != covered:
            raise StateError(
                f"This {kind} steps {names}, and was not given to the sparsifier: it would move "
                "weights past the masks. Make the sparsifier with all optimizers that step the "
                "model, in a list, or with optimizer=None."
            )
        known = optimizer in self.steppers
        if not known:
            self._accept(optimizer)
        self._met += [self.optimizers[i] for i in covered]
        self.optimizers[covered[-1]] = optimizer
        for i in reversed(covered[:-1]):
            del self.optimizers[i]
        if not known:
            warnings.warn(
                f"Another {kind} than the one given steps {names} from step {self.done + 1} on: it "
                "takes its place.",
                stacklevel=4,
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _begin(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.running is not None and self.is_within_one:
            self.running.inner += self.running.optimizer is optimizer
            return None
        if self.over:
            return None
        self.running = None
        weights = self.weights_of(optimizer)
        if not weights or changes_nothing(optimizer) or _has_nothing_to_do(optimizer, args, kwargs):
            return None
        if self.companion is not None:
            self.companion.arrive()
        self._require_countable(weights)
        if self.surplus and not self._said_surplus:
            self._said_surplus = True
            warnings.warn(
                f"This is step {self.done + 1} of total_steps={self.total}: the masks stay as they "
                "are from here on, and the rest trains. Call finalize() after the last step.",
                stacklevel=3,
            )
        result = self._before(optimizer, args, kwargs)
        self.running = RunningStep(optimizer)
        return result

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.running is None or self.running.optimizer is not optimizer:
            return
        if self.running.inner:
            self.running.inner -= 1
            return
        self.running = None
        self._after(optimizer, args, kwargs)

    def _require_countable(self, weights: Sequence[Prunable]) -> None:
        """Raise `StateError` where it cannot be known what one training step is."""
        if self.total is None or len(weights) == len(self._weights):
            return
        if torch._C._current_graph_task_id() != -1:
            raise StateError(
                "Optimizers step single weights inside a backward pass: it cannot be known when a "
                "training step is complete. Step one optimizer after the backward pass."
            )
        if self.optimizers:
            return
        if not self._stepped and self._whole and not self._whole & set(map(id, weights)):
            raise StateError(
                f"Optimizers take turns: {weights[0].name!r} is stepped apart from what was "
                f"stepped in the {self.done} training steps before, so it cannot be known what one "
                "step is. Give the optimizers in a list: the last one completes a step."
            )
        again = next((weight for weight in weights if id(weight) in self._stepped), None)
        if again is None:
            return
        waiting = [w.name for w in self._weights if _waits(w) and id(w) not in self._stepped]
        others = some_of(waiting) or "others"
        self._skipped += 1
        if not self._whole or self._skipped == _MOST_SKIPPED:
            raise StateError(
                f"{again.name!r} is stepped a second time before {others} was, so it cannot be "
                "known when a training step is complete. Give the optimizers in a list: the last "
                "one completes a step. Exclude weights that none of them steps."
            )
        self._stepped.clear()  # another optimizer skipped its step
        if self._skipped == 1:
            warnings.warn(
                f"After step {self.done} {again.name!r} is stepped again before {others} was, as "
                "when a GradScaler skips one of two optimizers: that step is not counted.",
                stacklevel=5,
            )


def _waits(weight: Prunable) -> bool:
    """Whether a weight has a gradient that some optimizer is going to use."""
    grad = weight.parameter.grad
    return weight.parameter.requires_grad and grad is not None and bool(grad.any())


def _has_nothing_to_do(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether no parameter has a gradient, and no closure will make one."""
    if len(args) > 1 or kwargs.get("closure") is not None:
        return False
    return all(p.grad is None for group in optimizer.param_groups for p in group["params"])


def _other_gradients(optimizer: Optimizer, known: set[int]) -> list[tuple[str, Tensor]]:
    """Return the dense gradients that an optimizer would also take, and what to call them."""
    return [
        (f"a weight of shape {tuple(p.shape)} that is not pruned", p.grad)
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None and id(p.grad) not in known and p.grad.layout is torch.strided
    ]
