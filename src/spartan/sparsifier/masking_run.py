"""The run of a method that masks weights: everything happens around `optimizer.step()`.

                     model sees            optimizer sees
 forward, backward   w = materialize(θ)
 before the step     grad_θ = pull_back(grad_w),  parameter ← θ
 optimizer.step                             θ ← θ - lr · …(grad_θ)
 after the step      masks ← select(θ);     parameter ← materialize(θ)

The parameter objects keep their identity; values are copied in place. No module is changed; under
methods that sample, the model has two hooks that show training passes their weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spartan.always_sparse.conversion import sparse_layers
from spartan.budgets.budget import Budget
from spartan.budgets.group_budget import GroupBudget
from spartan.deploy.latency import plan_latency
from spartan.errors import MethodError, NonFiniteError, StateError
from spartan.methods.masking.contract import MaskingMethod
from spartan.methods.masking.groups import make_group, require_finite
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.methods.masking.state import restored, saved
from spartan.sparsifier.layer_summary import LayerSummary, named, summarize_masks
from spartan.sparsifier.old_states import upgraded
from spartan.sparsifier.optimizers import (
    check_optimizers,
    loss_scale,
    parameters_of,
    skips_step,
    wrap_closure,
)
from spartan.sparsifier.pass_hooks import PassHook
from spartan.sparsifier.saved_state import (
    STATE_VERSION,
    check_state,
    restore,
    restored_weight,
    state_of,
)
from spartan.sparsifier.steps import OptimizerSteps
from spartan.sparsifier.weight_writer import WeightWriter
from spartan.weights.patterns import Pattern
from spartan.weights.prunable import NameFilter, find_prunable


class MaskingRun:
    """Keeps dense weights at a budget, under a method that masks them.

    Between steps every prunable parameter holds w, exactly sparse (methods that sample show other
    weights to training passes, see `MaskingMethod.samples`); inside `optimizer.step()` it holds the
    latent θ. Parameters in which something else writes between steps (loading weights, averaging)
    are noticed at the next step: the written values become the new θ, with a warning.
    Writes through `.data` escape notice, as they do autograd.
    A step whose gradients or weights are not finite raises before it does harm, and names itself.

    Args:
        model: The model.
        optimizers: Those to hook; none hooks all.
        method: How masks are found.
        budget: How much may stay.
        total_steps: Optimizer steps of the whole run.
        pattern: What a unit is.
        include: Which parameters are prunable, see `find_prunable`.
        exclude: Which are not.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        method: MaskingMethod,
        budget: Budget,
        total_steps: int | None,
        pattern: Pattern,
        include: NameFilter | None = None,
        exclude: NameFilter | None = None,
    ) -> None:
        self.model, self.method, self.budget, self.pattern = model, method, budget, pattern
        if sparse_layers(model):
            raise MethodError(
                f"{method.name!r} masks dense weights, and the model has always-sparse layers: use "
                "'gse', 'set', 'rigl', 'dst-ee' or 'static', or make them dense with "
                "always_sparse.to_dense."
            )
        prunables = find_prunable(model, include, exclude)
        if budget.latency_ms is None:
            budgets = budget.plan(model, prunables, pattern)
        else:
            budgets = plan_latency(budget, model, prunables, pattern)
        check_optimizers(optimizers, prunables)
        for prunable in prunables:
            if not bool(torch.isfinite(prunable.parameter).all()):
                raise NonFiniteError(f"The weight {prunable.name!r} holds NaN or infinity.")

        kinds = method.group_state, method.weight_state
        self.groups = [make_group(one, prunables, pattern, *kinds) for one in budgets]
        by_name = {weight.name: weight for group in self.groups for weight in group.weights}
        self.weights = [by_name[prunable.name] for prunable in prunables]
        for weight in self.weights:
            weight.latent.copy_(method.to_latent(weight, weight.latent))
        self.steps = OptimizerSteps(optimizers, total_steps, prunables)
        self._handles: list[Any] = []
        self._writer = WeightWriter(method, self.weights)
        self._inside: list[MaskedWeight] = []  # whose parameter holds θ: a step is under way
        self._guards: list[RemovableHandle] = []
        self._checked_dead = False
        self._mark_active()
        if self.method.moves_masks(0, self.steps.horizon):
            self.method.select(self.groups, 0, self.steps.horizon)
        self._writer.write(self.weights)
        self._warn_dead()
        self._handles = self._register_hooks()

    # What the user asks -------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Kept fraction of the prunable weights, counted in the masks."""
        kept = sum(s.kept * self.pattern.unit_numel(s.prunable) for s in self.weights)
        return kept / sum(s.prunable.parameter.numel() for s in self.weights)

    def layers(self) -> list[LayerSummary]:
        """Return what each prunable weight keeps, in the order of the model."""
        return summarize_masks(self.groups, self.pattern)

    def monitor(self) -> dict[str, float]:
        """Return density and the method's numbers, averaged over groups."""
        rows = [self.method.monitor(group) for group in self.groups]
        keys = {key for row in rows for key in row}
        means = {key: sum(row[key] for row in rows) / len(rows) for key in sorted(keys)}
        return {"density": self.density, **means}

    def budgets(self) -> list[tuple[str, GroupBudget]]:
        """Return the budget of each group, after the names of its weights."""
        return [(named([w.name for w in group.weights]), group.budget) for group in self.groups]

    def progress_after(self, step: int) -> float:
        """Say how far the density has come after a step."""
        return self.method.progress(step, self.steps.horizon)

    def moves_after(self, step: int) -> bool:
        """Say whether masks are selected after a step."""
        return self.method.moves_masks(step, self.steps.horizon)

    def selected(self) -> dict[str, Tensor]:
        """Return the masks."""
        return {weight.name: weight.mask.clone() for weight in self.weights}

    def churn(self, before: Mapping[str, Tensor]) -> float:
        """Return the share of all units whose mask has changed since."""
        changed = sum(int((weight.mask != before[weight.name]).sum()) for weight in self.weights)
        return changed / sum(weight.mask.numel() for weight in self.weights)

    def finalize(self) -> None:
        """Leave plain, exactly sparse weights and no hook; the sparsifier is done.

        Called before the schedule has reached the budget, it selects once more, at the budget.
        """
        self._leave_step()
        for weight in self.weights:
            weight.active = True
        if any(self._writer.was_overwritten(weight) for weight in self.weights):
            raise StateError(
                "Weights were written outside the optimizer since the last step; call finalize() "
                "first and load other weights after it."
            )
        if not self._at_budget() or self.method.samples(self.steps.done, self.steps.horizon):
            warnings.warn(
                f"finalize() at step {self.steps.done} of {self.steps.total}, before the schedule "
                "reached the budget: the rest is pruned at once.",
                stacklevel=3,
            )
            self.method.select(self.groups, self.steps.horizon, self.steps.horizon)
        self._writer.write(self.weights)
        self._end_step()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for weight in self.weights:
            weight.latent = torch.empty(0)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a bit-for-bit resume needs, as plain values and tensors."""
        self._leave_step()
        return {
            "version": STATE_VERSION,
            "settings": self._settings(),
            "step": self.steps.done,
            "weights": {weight.name: state_of(weight) for weight in self.weights},
            "groups": [saved(group.state) for group in self.groups],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; also writes the sparse weights into the model."""
        measured = self.budget.latency_ms is not None
        kinds = self.method.weight_state, self.method.group_state
        state = upgraded(state, *kinds)
        check_state(state, self._settings(), self.weights, len(self.groups), measured)
        device = self.weights[0].latent.device
        groups = [restored(self.method.group_state, values, device) for values in state["groups"]]
        weights = [restored_weight(w, state["weights"][w.name], kinds[0]) for w in self.weights]
        self._end_step()
        self.steps.done = int(state["step"])
        for weight, own in zip(self.weights, weights, strict=True):
            restore(weight, state["weights"][weight.name], own)
        for group, own_state in zip(self.groups, groups, strict=True):
            group.state = own_state
        if measured:
            # What was measured when the run was begun, not what was measured again just now.
            for group, (kept, total, *costs) in zip(
                self.groups, state["settings"]["budgets"], strict=True
            ):
                group.adopt(GroupBudget(group.budget.members, tuple(costs), total, kept))
        self._writer.write(self.weights)

    # Around a step ------------------------------------------------------------------------------

    def _register_hooks(self) -> list[Any]:
        passes: list[Any] = []
        if self.method.samples(0, self.steps.horizon):
            shown, saved = (
                PassHook(self.model, f) for f in (self._before_pass, self._before_saving)
            )
            passes.append(self.model.register_forward_pre_hook(shown))
            passes.append(self.model.register_state_dict_pre_hook(saved))
        return passes + self.steps.hook(self._before_step, self._after_step)

    @torch.no_grad()
    def _before_pass(self, training: bool) -> None:
        """Let a training pass see sampled weights, and every other one the plain w."""
        self._leave_step()
        self._writer.adopt(self.weights, self.steps.done)
        if training and self.method.samples(self.steps.done, self.steps.horizon):
            self._writer.write_sample(self.weights, self.steps.done)
        elif any(weight.sampled for weight in self.weights):
            self._writer.write(self.weights)

    def _before_saving(self, training: bool) -> None:
        self._before_pass(training=False)

    @torch.no_grad()
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        weights = self._weights_of(optimizer)
        if not weights:
            return None
        self._leave_step()
        self.steps.refuse_more(optimizer)
        self._writer.adopt(self.weights, self.steps.done)
        for weight in weights if self.method.samples(self.steps.done, self.steps.horizon) else []:
            weight.loss_scale = loss_scale(optimizer)
        args, kwargs, wrapped = wrap_closure(args, kwargs, lambda f: self._closure(f, weights))
        if not wrapped:
            self._pull_back(weights, skipped=skips_step(optimizer))
        self._guard_model()
        self._show_theta(weights)
        return (args, kwargs) if wrapped else None

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        weights = self._inside
        if not weights or self._weights_of(optimizer) != weights:
            return
        if skips_step(optimizer):
            self._leave_step()
            return
        completes = self.steps.completed_by(optimizer)
        moves = completes and self.method.moves_masks(self.steps.done + 1, self.steps.horizon)
        try:
            if not (moves and self.method.checks_weights):
                require_finite(weights)
            if moves:
                self.method.select(self.groups, self.steps.done + 1, self.steps.horizon)
        except BaseException as error:
            self._leave_step()
            if isinstance(error, NonFiniteError):
                raise NonFiniteError(f"Step {self.steps.done + 1}: {error}") from None
            raise
        # From here on, whatever interrupts leaves the step as a step that was done.
        self.steps.done += completes
        written = self.weights if moves else weights
        try:
            self._writer.write(written)
        except BaseException:
            self._writer.write(written)
            raise
        finally:
            self._end_step()
        if moves:
            self._warn_dead()

    def _closure(
        self, closure: Callable[[], Any], weights: list[MaskedWeight]
    ) -> Callable[[], Any]:
        """Wrap a closure so that it sees w, and the optimizer the gradient of θ."""

        def evaluate() -> Any:
            with torch.no_grad():
                self._writer.write(weights)
            self._inside = []  # if the closure raises, the model holds w already
            loss = closure()
            with torch.no_grad():
                self._pull_back(weights)
                self._show_theta(weights)
            return loss

        return evaluate

    def _pull_back(self, weights: list[MaskedWeight], skipped: bool = False) -> None:
        for weight in weights:
            weight.active = weight.grad is not None
        active = [weight for weight in weights if weight.active]
        if not skipped:
            self.steps.require_finite_gradients([weight.prunable for weight in active])
        chosen = set(map(id, active))
        for group in self.groups:
            members = [weight for weight in group.weights if id(weight) in chosen]
            if members:
                self.method.pull_back(group, members, self.steps.done, self.steps.horizon)

    def _show_theta(self, weights: list[MaskedWeight]) -> None:
        """Let the parameters hold θ, for the optimizer to move."""
        self._inside = weights
        for weight in weights:
            weight.prunable.parameter.copy_(weight.latent)
            weight.stepping = True

    def _warn_dead(self) -> None:
        """Say once, when the budget is first reached, which layers keep nothing."""
        if self._checked_dead or self.method.progress(self.steps.done, self.steps.horizon) < 1.0:
            return
        self._checked_dead = True
        dead = [weight.name for weight in self.weights if not bool(weight.mask.any())]
        if dead:
            warnings.warn(
                f"Nothing is kept of {', '.join(map(repr, dead))} at step {self.steps.done}. "
                "Weights can come back while masks move; if these do not, spread the budget with "
                "allocation='erk' or 'uniform', or exclude them.",
                stacklevel=2,
            )

    def _leave_step(self) -> None:
        """Restore w where a step was begun and did not end, by an exception or a skip."""
        if self._inside:
            inside = self._inside
            self._end_step()
            self._writer.write(inside)

    def _guard_model(self) -> None:
        """Heal the model before it is used, should the step that begins now never end.

        The hooks are there during a step only, where nobody runs or saves the model.
        """
        self._remove_guards()
        self._guards = [
            self.model.register_forward_pre_hook(lambda *_: self._leave_step()),
            self.model.register_state_dict_pre_hook(lambda *_: self._leave_step()),
        ]

    def _end_step(self) -> None:
        """Forget the step that is under way, if one is, and what was selected in it."""
        self._inside = []
        for weight in self.weights:
            weight.stepping, weight.pending = False, None
        self._remove_guards()

    def _remove_guards(self) -> None:
        for guard in self._guards:
            guard.remove()
        self._guards = []

    # Small parts --------------------------------------------------------------------------------

    def _weights_of(self, optimizer: Optimizer) -> list[MaskedWeight]:
        stepped = set(map(id, self.steps.weights_of(optimizer)))
        return [weight for weight in self.weights if id(weight.prunable) in stepped]

    def _mark_active(self) -> None:
        """Weights that no optimizer steps keep the masks they get when the budget is reached."""
        stepped = set().union(*map(parameters_of, self.steps.optimizers))
        for weight in self.weights:
            weight.active = not self.steps.optimizers or id(weight.prunable.parameter) in stepped

    @property
    def attached(self) -> bool:
        """Whether the hooks are there still."""
        return bool(self._handles)

    def _at_budget(self) -> bool:
        return all(group.kept <= group.budget.kept for group in self.groups)

    def _settings(self) -> dict[str, Any]:
        return {
            "method": self.method.settings(),
            "pattern": str(self.pattern),
            "total_steps": self.steps.total,
            "latency_ms": self.budget.latency_ms,
            "budgets": [[b.kept, b.total, *b.costs] for b in (g.budget for g in self.groups)],
        }
