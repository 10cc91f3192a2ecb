"""`OptimizerSteps`: hooks around the optimizer steps of a run, and their count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from spartan.errors import NonFiniteError, ScheduleError
from spartan.kernels import finite
from spartan.sparsifier.optimizers import parameters_of
from spartan.weights.prunable import Prunable


class OptimizerSteps:
    """The steps of the optimizers that step some weights.

    A step is complete when the last of several optimizers that steps one of the weights has
    stepped.

    Args:
        optimizers: Those to hook; none hooks every optimizer of the process.
        total: Steps of the whole run; None where there is no schedule.
        weights: The weights.

    Attributes:
        done: Steps completed.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], total: int | None, weights: Sequence[Prunable]
    ) -> None:
        self.optimizers = optimizers
        self.total = total
        self.done = 0
        self._weights = weights

    @property
    def horizon(self) -> int:
        """Steps of the whole run; without a schedule, more than there will ever be."""
        return self.total if self.total is not None else 2**62

    def hook(self, before: Callable[..., Any], after: Callable[..., Any]) -> list[Any]:
        """Call `before` and `after` around every step; returns the handles of the hooks."""
        if not self.optimizers:
            return [
                register_optimizer_step_pre_hook(before),
                register_optimizer_step_post_hook(after),
            ]
        return [
            handle
            for optimizer in self.optimizers
            for handle in (
                optimizer.register_step_pre_hook(before),
                optimizer.register_step_post_hook(after),
            )
        ]

    def weights_of(self, optimizer: Optimizer) -> list[Prunable]:
        """Return the weights an optimizer steps now; its parameter groups may have grown."""
        if self.optimizers and not any(optimizer is known for known in self.optimizers):
            return []
        stepped = parameters_of(optimizer)
        return [weight for weight in self._weights if id(weight.parameter) in stepped]

    def completed_by(self, optimizer: Optimizer) -> bool:
        """Say whether a step is complete when this optimizer has stepped."""
        if not self.optimizers:
            return True
        return optimizer is [o for o in self.optimizers if self.weights_of(o)][-1]

    def refuse_more(self, optimizer: Optimizer) -> None:
        """Raise `ScheduleError` if the step that begins is one too many."""
        over = self.total is not None and self.done >= self.total
        if over and self.completed_by(optimizer):
            raise ScheduleError(
                f"This is step {self.done + 1}, but total_steps={self.total}: call "
                "finalize() after the last step, or make the sparsifier with more steps."
            )

    def require_finite_gradients(self, weights: Sequence[Prunable]) -> None:
        """Raise `NonFiniteError` if a gradient of these weights is not finite."""
        grads = {w.name: w.parameter.grad for w in weights if w.parameter.grad is not None}
        # A GPU is not waited for: a broken gradient shows in the weights after the step.
        if any(grad.is_cuda for grad in grads.values()):
            return
        for name, ok in zip(grads, finite(list(grads.values())), strict=True):
            if not ok:
                raise NonFiniteError(
                    f"The gradient of {name!r} is NaN or infinite at step {self.done + 1}; weights "
                    "and masks are unchanged. Lower the learning rate, clip gradients, or use a "
                    "GradScaler with float16."
                )
