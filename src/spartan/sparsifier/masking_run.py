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
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spartan.always_sparse.conversion import sparse_layers
from spartan.budgets.budget import Budget
from spartan.errors import MethodError, NonFiniteError, StateError
from spartan.methods.masking.contract import MaskingMethod
from spartan.methods.masking.groups import require_finite
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.sparsifier.budget_warnings import note_newborn, warn_of_dead_layers
from spartan.sparsifier.governors import govern, release
from spartan.sparsifier.group_plan import GroupPlan
from spartan.sparsifier.masked_model import MaskedModel
from spartan.sparsifier.open_step import OpenStep
from spartan.sparsifier.optimizers import (
    check_optimizers,
    loss_scale,
    parameters_of,
    skips_step,
    wrap_closure,
)
from spartan.sparsifier.pass_hooks import PassHook
from spartan.sparsifier.projection import Keep
from spartan.sparsifier.saved_state import go_on_from, read_run, run_state
from spartan.sparsifier.steps import OptimizerSteps
from spartan.sparsifier.weight_writer import WeightWriter
from spartan.weights.coverage import say_coverage
from spartan.weights.maskable import check_maskable
from spartan.weights.patterns import Pattern
from spartan.weights.prunable import NameFilter, Prunable, find_prunable


class MaskingRun:
    """Keeps dense weights at a budget, under a method that masks them.

    Between steps every prunable parameter holds w, exactly sparse (methods that sample show other
    weights to training passes, see `MaskingMethod.samples`); inside `optimizer.step()` it holds the
    latent θ, and w again while somebody runs or saves the model there. Parameters in which
    something else writes between steps (loading weights, averaging, float32 masters) are noticed at
    the next step: the written values become the new θ, with a warning.
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

    Attributes:
        weights: The masked weights, in the order of the model.
        groups: Those that share a budget.
        steps: The count of steps.
        facts: What the model holds now.
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
        self.model = model
        if sparse_layers(model):
            raise MethodError(
                f"{method.name!r} masks dense weights, and the model has always-sparse layers: use "
                "'gse', 'set', 'rigl', 'dst-ee' or 'static', or make them dense with "
                "always_sparse.to_dense."
            )
        prunables = find_prunable(model, include, exclude)
        if include is None:
            prunables = [one for one in prunables if not pattern.leaves_out(one)] or prunables
        check_maskable(prunables)
        self.plan = GroupPlan(model, prunables, pattern, budget, method)
        check_optimizers(optimizers, prunables, trains=method.finds_masks)
        self.groups, self.weights = self.plan.groups, self.plan.weights
        self.method = method
        self.steps = OptimizerSteps(optimizers, total_steps, prunables)
        note_newborn(self.weights, method, method.progress(0, self.steps.horizon) >= 1)
        for weight in self.weights:
            weight.latent.copy_(method.to_latent(weight, weight.latent))
        self._writer = WeightWriter(method, self.weights)
        self._step = OpenStep(model, self.weights, self._writer, lambda: self.steps.is_within_one)
        self._checked_dead = self._abandoned = False
        self._mark_active()
        if self.method.moves_masks(0, self.steps.horizon):
            self.method.select(self.groups, 0, self.steps.horizon)
        self._writer.write(self.weights)
        self._warn_dead()
        self.facts = MaskedModel(model, method, self.groups, self.weights, self._writer)
        decided = include is not None or not method.finds_masks
        say_coverage(self.facts.coverage, decided, stacklevel=4)
        govern(prunables, self)
        self._handles = self._register_hooks()

    # What the user asks -------------------------------------------------------------------------

    @property
    def first_weight(self) -> Prunable:
        """The first of the weights."""
        return self.weights[0].prunable

    @property
    def connections_exchanged(self) -> bool:
        """Return False: there are none."""
        return False

    @property
    def at_budget(self) -> bool:
        """Whether the masks hold the budget."""
        return self.plan.at_budget

    def progress_after(self, step: int) -> float:
        """Say how far the density has come after a step."""
        return self.method.progress(step, self.steps.horizon)

    def moves_after(self, step: int) -> bool:
        """Say whether masks are selected after a step."""
        return self.method.moves_masks(step, self.steps.horizon)

    @property
    def moves(self) -> bool:
        """Whether masks move in what is left of the run."""
        return self.attached and any(map(self.moves_after, self.steps.left))

    def finalize(self, keep: Keep | None = None) -> None:
        """Leave plain, exactly sparse weights and no hook; see `Sparsifier.finalize`."""
        if not self.attached:
            self._require_unchanged()
            return
        self._step.leave()
        if keep != "model":
            self.facts.watch.require_present()
        written = self.facts.overwritten()
        if written and keep == "model" and self.facts.adopt_masks():
            self._detach()  # an earlier model of this run, say: at the budget by masks of its own
            return
        if written and keep is None:
            raise StateError(
                f"{written[0].name!r} was written outside the optimizer since step "
                f"{self.steps.done}. finalize(keep='model') keeps what the model holds now, where "
                "the masks keep it; finalize(keep='own') puts back what the last step left."
            )
        for weight in self.weights:
            weight.active = True
        done, total = self.steps.done, self.steps.horizon
        if not self.at_budget or self.method.samples(done, total):
            warnings.warn(
                f"finalize() at step {done} of {self.steps.total}, before the schedule reached the "
                "budget: the rest is pruned at once.",
                stacklevel=3,
            )
            if keep == "model":
                self._writer.adopt(written, done, exact=True)
                written = []
            self.method.select(self.groups, total, total)
        kept = written if keep == "model" else []
        self._writer.write([weight for weight in self.weights if weight not in kept])
        self.facts.mask_what_is_there(kept)
        self._detach()

    def extend(self, total_steps: int) -> None:
        """Let the schedule end after so many steps; see `Sparsifier.extend`."""
        self.steps.total = total_steps

    def retarget(self, budget: Budget) -> None:
        """Go on to another budget; see `Sparsifier.retarget`."""
        self.plan.retarget(budget)

    def abandon(self) -> None:
        """Take all hooks away, and leave the model as it is."""
        self._abandoned = True
        self._step.leave()
        self._detach()

    def _detach(self) -> None:
        """Take all hooks away."""
        gone = [repr(self.weights[i].name) for i in self.facts.watch.gone()]
        if gone:
            warnings.warn(
                f"The model has another parameter in the place of {', '.join(gone)}: no mask was "
                "made for it, and it is left as it is.",
                stacklevel=4,
            )
        self._step.end()
        self.facts.watch.stop()
        self.steps.stop()
        release([weight.prunable for weight in self.weights], self)
        for handle in self._handles:
            handle.remove()
        self.facts.end()

    def _require_unchanged(self) -> None:
        """Raise `StateError` unless the model still is what `finalize` left."""
        if self._abandoned:
            raise StateError("This sparsifier ended when another one was made for its weights.")
        if self.facts.watch.gone() or self.facts.overwritten():
            raise StateError(
                "finalize() was called before, and the model was trained or written since: it is "
                "no longer at the budget. project(model) prunes it again; spartan.freeze(model) "
                "holds zeros while a model is fine-tuned."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return everything a bit-for-bit resume needs, as plain values and tensors."""
        self._step.leave()
        self.facts.watch.require_present()
        self._writer.adopt(self.weights, self.steps.done, exact=True)
        return run_state(self._settings(), self.steps.done, self.weights, self.groups)

    def snapshot(self) -> dict[str, Any]:
        """Return the same, with θ as the next step will find it, and leave the run as it is."""
        self._step.leave()
        self.facts.watch.require_present()
        state = run_state(self._settings(), self.steps.done, self.weights, self.groups)
        for weight in self.weights:
            state["weights"][weight.name]["latent"] = self._writer.adopted(weight, exact=True)
        return state

    def prepare(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Read a state, and return what continues from it; see `Sparsifier.load_state_dict`."""
        measured = self.plan.budget.latency_ms is not None
        saved = read_run(
            state, self._settings(), self.method, self.weights, self.groups, self.steps.horizon,
            measured,
        )  # fmt: skip

        def go_on() -> None:
            self._step.leave()
            self.facts.watch.require_present()
            go_on_from(saved, self.weights, self.groups)
            self.method = self._writer.method = self.facts.method = saved.method
            self.steps.resume(saved.step)
            self._writer.write(self.weights)

        return go_on

    # Around a step ------------------------------------------------------------------------------

    def _register_hooks(self) -> list[RemovableHandle]:
        passes: list[RemovableHandle] = []
        if self.method.samples(0, self.steps.horizon):
            shown, saved = (PassHook(self.model, f) for f in (self.begin_pass, self._before_saving))
            passes.append(self.model.register_forward_pre_hook(shown))
            passes.append(self.model.register_state_dict_pre_hook(saved))
        self.steps.hook(
            self._before_step, self._after_step, lambda _: None, self.facts.watch.other_step
        )
        return passes

    @torch.no_grad()
    def begin_pass(self, training: bool) -> None:
        """Let a training pass see sampled weights, and every other one the plain w."""
        if not self.method.samples(0, self.steps.horizon):
            return
        if self._step.inside and self.steps.is_within_one:
            return  # the guard shows w
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise MethodError(
                f"{self.method.name!r} writes random weights before each training pass, which "
                "cannot be done inside of torch.func (grad, vmap, jacrev): call the model and "
                "backward() as usual, or take a method without gates."
            )
        self._step.leave()
        if training and self.steps.companion is not None:
            self.steps.companion.arrive()
        if not training and any(self._writer.changes(w, False) is not None for w in self.weights):
            return  # an average, say, that is swapped in to be evaluated, and swapped out again
        self._writer.adopt(self.weights, self.steps.done)
        if training and self.method.samples(self.steps.done, self.steps.horizon):
            self._writer.write_sample(self.weights, self.steps.done)
        elif any(weight.sampled for weight in self.weights):
            self._writer.write(self.weights)

    def _before_saving(self, training: bool) -> None:
        self.begin_pass(training=False)

    @torch.no_grad()
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        weights = self._weights_of(optimizer)
        self._step.leave()
        self.facts.watch.step()
        self._writer.adopt(self.weights, self.steps.done)
        for weight in weights if self.method.samples(self.steps.done, self.steps.horizon) else []:
            weight.loss_scale = loss_scale(optimizer)
        closure = lambda f: self._closure(f, weights, optimizer)  # noqa: E731
        args, kwargs, wrapped = wrap_closure(args, kwargs, closure)
        if not wrapped:
            self._pull_back(weights, optimizer)
        self._step.open(weights)
        return (args, kwargs) if wrapped else None

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        weights = self._step.inside
        if not weights:
            return
        if skips_step(optimizer):
            self._step.leave()
            return
        completes = self.steps.completed_by(optimizer)
        moves = (
            completes
            and not self.steps.surplus
            and self.method.moves_masks(self.steps.done + 1, self.steps.horizon)
        )
        try:
            if not (moves and self.method.checks_weights):
                require_finite(weights)
            if moves:
                self.method.select(self.groups, self.steps.done + 1, self.steps.horizon)
        except BaseException as error:
            self._step.leave()
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
            self._step.end()
        if moves:
            self._warn_dead()

    def _closure(
        self, closure: Callable[[], Any], weights: list[MaskedWeight], optimizer: Optimizer
    ) -> Callable[[], Any]:
        """Wrap a closure so that it sees w, and the optimizer the gradient of θ."""

        def evaluate() -> Any:
            with torch.no_grad():
                self._writer.write(weights)
            self._step.inside = []  # if the closure raises, the model holds w already
            self.begin_pass(self.model.training)
            loss = closure()
            with torch.no_grad():
                self._pull_back(weights, optimizer)
                self._step.show_theta(weights)
            return loss

        return evaluate

    def _pull_back(self, weights: list[MaskedWeight], optimizer: Optimizer) -> None:
        for weight in weights:
            weight.active = weight.grad is not None
        active = [weight for weight in weights if weight.active]
        if not skips_step(optimizer):
            self.steps.require_finite_gradients([w.prunable for w in active], optimizer)
        chosen = set(map(id, active))
        for group in self.groups:
            members = [weight for weight in group.weights if id(weight) in chosen]
            if members:
                self.method.pull_back(group, members, self.steps.done, self.steps.horizon)

    # Small parts --------------------------------------------------------------------------------

    def _weights_of(self, optimizer: Optimizer) -> list[MaskedWeight]:
        stepped = set(map(id, self.steps.weights_of(optimizer)))
        return [weight for weight in self.weights if id(weight.prunable) in stepped]

    def _warn_dead(self) -> None:
        """Say once, when the budget is first reached, which layers keep nothing."""
        if not (
            self._checked_dead or self.method.progress(self.steps.done, self.steps.horizon) < 1
        ):
            self._checked_dead = True
            warn_of_dead_layers(self.groups, self.steps.done)

    def _mark_active(self) -> None:
        """Weights that no optimizer steps keep the masks they get when the budget is reached."""
        stepped = set().union(*map(parameters_of, self.steps.optimizers))
        for weight in self.weights:
            weight.active = not self.steps.optimizers or id(weight.prunable.parameter) in stepped

    @property
    def attached(self) -> bool:
        """Whether the hooks are there still."""
        return not self.steps.over

    def _settings(self) -> dict[str, Any]:
        return {
            "method": self.method.settings(),
            "total_steps": self.steps.total,
            **self.plan.settings(),
        }
