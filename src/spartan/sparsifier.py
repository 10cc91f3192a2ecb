"""What keeps a model at its budget while an optimizer trains it, whatever the method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from spartan.budget import Budget
from spartan.described import Described
from spartan.errors import NonFiniteError, ScheduleError, StateError
from spartan.kernels import finite
from spartan.optimizer_steps import as_list, parameters_of
from spartan.patterns import Pattern, Unstructured
from spartan.prunable import NameFilter, Prunable
from spartan.shares import Share
from spartan.summary import LayerSummary


class Sparsifier:
    """Keeps a model at an exact budget while its optimizer trains it.

    Args:
        model: Any module; it is not modified, except for the values of its prunable weights.
        optimizer: The optimizer, or several. A step is complete, and masks move, when the last
            of them that steps a prunable weight has stepped. The price that couples Spartan's
            gradients spans the weights of one optimizer. None hooks every optimizer that steps a
            prunable weight.
        method: How masks are found; see `spartan.methods`.
        budget: How much may stay.
        total_steps: Optimizer steps of the whole run; None only for methods without a schedule.
        pattern: What a unit is.
        include: Which parameters are prunable, see `find_prunable`.
        exclude: Which are not. Growth methods govern all always-sparse layers, and one names layers
            when they are made.

    Methods that mask weights keep the model dense in memory (`spartan.masking`); growth methods
    move the connections of always-sparse layers (`spartan.always_sparse`). A step whose gradients
    or weights are not finite raises before it does harm, and names itself.

    Raises:
        SpartanError: One of its children, for any argument that does not fit, before anything is
            changed.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Sparsifier:
        """Make the sparsifier of the method's kind."""
        # These build on this module.
        from spartan.always_sparse.growing import GrowingSparsifier
        from spartan.always_sparse.growth import Growth
        from spartan.masking import MaskingSparsifier

        if issubclass(cls, GrowingSparsifier | MaskingSparsifier):
            return super().__new__(cls)
        if cls is not Sparsifier:
            raise TypeError(
                "Derive from spartan.masking.MaskingSparsifier, or its like for growth."
            )
        method = kwargs["method"] if "method" in kwargs else (*args, None, None, None)[2]
        kind = GrowingSparsifier if isinstance(method, Growth) else MaskingSparsifier
        return super().__new__(kind)

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        method: Described,
        budget: Budget,
        total_steps: int | None,
        pattern: Pattern | None = None,
        include: NameFilter | None = None,
        exclude: NameFilter | None = None,
    ) -> None:
        if total_steps is not None and total_steps < 1:
            raise ScheduleError(f"total_steps={total_steps} must be at least 1.")
        if total_steps is None and method.scheduled:
            raise ScheduleError(f"The method {method.name!r} needs total_steps= for its schedule.")
        self.model = model
        self.method = method
        self.budget = budget
        self.pattern = pattern or Unstructured()
        self.total_steps = total_steps
        self.step = 0
        self._optimizers = as_list(optimizer)
        self._handles: list[Any] = []
        self.sites: Sequence[Any] = []  # what has a `weight`

    # What the user asks -------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Kept fraction of the prunable weights, counted."""
        raise NotImplementedError

    @property
    def finalized(self) -> bool:
        """Whether `finalize` was called."""
        return not self._handles

    def layers(self) -> list[LayerSummary]:
        """Return what each prunable weight keeps, group by group."""
        raise NotImplementedError

    def monitor(self) -> dict[str, float]:
        """Return density and the method's numbers."""
        raise NotImplementedError

    def shares(self) -> list[tuple[str, Share]]:
        """Return the budgets: what they are of, and how much they are."""
        raise NotImplementedError

    def progress_after(self, step: int) -> float:
        """Say how far the density has come after a step: from everything, 0, to the budget, 1."""
        raise NotImplementedError

    def moves_after(self, step: int) -> bool:
        """Say whether what is kept is chosen anew after a step."""
        raise NotImplementedError

    def selected(self) -> dict[str, Tensor]:
        """Return what of each weight is kept, to compare with later; see `churn`."""
        raise NotImplementedError

    def churn(self, before: Mapping[str, Tensor]) -> float:
        """Return the share of what is selected that has changed since `selected` returned this."""
        raise NotImplementedError

    def finalize(self) -> None:
        """Leave an exactly sparse model and no hook; the sparsifier is done."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return everything a bit-for-bit resume needs, as plain values and tensors.

        The model's and the optimizer's own state dicts are saved beside it.
        """
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            StateError: The state is of another model, method, budget or schedule. Nothing is
                changed then.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        return (
            f"Sparsifier({self.method}, pattern={self.pattern}, weights={len(self.sites)}, "
            f"step={self.step}/{self.total_steps})"
        )

    # Around a step ------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        raise NotImplementedError

    def _hook_steps(self) -> list[Any]:
        if not self._optimizers:
            return [
                register_optimizer_step_pre_hook(self._before_step),
                register_optimizer_step_post_hook(self._after_step),
            ]
        return [
            handle
            for optimizer in self._optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            )
        ]

    def _refuse_more_steps(self, optimizer: Optimizer) -> None:
        done = self.total_steps is not None and self.step >= self.total_steps
        if done and self._completes_step(optimizer):
            raise ScheduleError(
                f"This is step {self.step + 1}, but total_steps={self.total_steps}: call "
                "finalize() after the last step, or make the sparsifier with more steps."
            )

    def _require_finite(self, weights: Sequence[Prunable]) -> None:
        """Raise `NonFiniteError` if a gradient of these weights is not finite."""
        grads = {w.name: w.parameter.grad for w in weights if w.parameter.grad is not None}
        # A GPU is not waited for: a broken gradient shows in the weights after the step.
        if any(grad.is_cuda for grad in grads.values()):
            return
        for name, ok in zip(grads, finite(list(grads.values())), strict=True):
            if not ok:
                raise NonFiniteError(
                    f"The gradient of {name!r} is NaN or infinite at step {self.step + 1}; weights "
                    "and masks are unchanged. Lower the learning rate, clip gradients, or use a "
                    "GradScaler with float16."
                )

    # Small parts --------------------------------------------------------------------------------

    @property
    def _horizon(self) -> int:
        return self.total_steps if self.total_steps is not None else 2**62

    def _steps(self, optimizer: Optimizer) -> list[Prunable]:
        """Return the weights an optimizer steps now; its parameter groups may have grown."""
        if self._optimizers and not any(optimizer is known for known in self._optimizers):
            return []
        stepped = parameters_of(optimizer)
        return [site.weight for site in self.sites if id(site.weight.parameter) in stepped]

    def _completes_step(self, optimizer: Optimizer) -> bool:
        """Whether a step is complete when this optimizer has stepped."""
        if not self._optimizers:
            return True
        return optimizer is [o for o in self._optimizers if self._steps(o)][-1]

    def _require_attached(self) -> None:
        if self.finalized:
            raise StateError("This sparsifier was finalized; make a new one.")

    def _budgets(self, shares: Iterable[Share]) -> list[list[float]]:
        return [[share.kept, share.total, *share.costs] for share in shares]


def named(names: Sequence[str]) -> str:
    """Return a name for one or several weights."""
    return names[0] if len(names) == 1 else f"{len(names)} weights"
