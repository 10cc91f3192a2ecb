"""`Sparsifier`: keeps a model at an exact budget while its optimizer trains it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spartan.budgets.budget import Budget, as_budget
from spartan.budgets.group_budget import GroupBudget
from spartan.errors import ScheduleError, StateError, renamed
from spartan.methods.growth.contract import GrowingLayer, GrowthMethod
from spartan.methods.masking.contract import MaskingMethod
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.methods.registry import as_method
from spartan.sparsifier.arguments import (
    as_optimizers,
    as_pattern,
    check_carrier,
    check_model,
    check_steps,
)
from spartan.sparsifier.carrier import (
    Carrier,
    brings_state,
    ignore_brought,
    unchanged_on_error,
)
from spartan.sparsifier.growing_run import GrowingRun
from spartan.sparsifier.layer_summary import LayerSummary
from spartan.sparsifier.masking_run import MaskingRun
from spartan.sparsifier.projection import Target
from spartan.weights.coverage import Coverage
from spartan.weights.patterns import Pattern
from spartan.weights.prunable import NameFilter

_NAMES_OF_0_1 = {"sites": "weights", "groups": "run.groups", "shares": "budgets"}


class Sparsifier:
    """Keeps a model at an exact budget while its optimizer trains it.

    Args:
        model: Any module; it is not modified, except for the values of its prunable weights.
        optimizer: The optimizer, or several, or the handle of a trainer around one. A step is
            complete, and masks of all weights move, when the last of the list that steps a
            prunable weight has stepped: let it be the one that steps last in the loop. The price
            that couples Spartan's gradients spans the weights of one optimizer. None hooks every
            optimizer that steps a prunable weight; a step is complete when all weights that have
            gradients were stepped.
        method: How masks are found: a method of `spartan.methods`, or its name.
        budget: How much may stay; a number is the density of a `Budget`.
        total_steps: Optimizer steps of the whole run; None only for methods without a schedule.
        pattern: What a unit is: a pattern, or its name as `"2:4"`; by default single weights.
        include: Which parameters are prunable, see `find_prunable`.
        exclude: Which are not. Growth methods govern all always-sparse layers, and one names layers
            when they are made.
        checkpoint_with: With `"optimizer"` the state rides in `optimizer.state_dict()`, of the
            first where there are several, and whoever saves model and optimizer has saved the run:
            it goes on bit for bit when both are loaded, before or after the sparsifier is made.
            None: `state_dict()` is saved beside them.

    Methods that mask weights keep the model dense in memory (`sparsifier.masking_run`); growth
    methods move the connections of always-sparse layers (`sparsifier.growing_run`). A step whose
    gradients or weights are not finite raises before it does harm, and names itself.

    Attributes:
        run: What does the work: a `MaskingRun` or a `GrowingRun`.

    Raises:
        SpartanError: One of its children, for any argument that does not fit, before anything is
            changed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        method: MaskingMethod | GrowthMethod | str,
        budget: Budget | float,
        total_steps: int | None,
        pattern: Pattern | str | None = None,
        include: NameFilter | None = None,
        exclude: NameFilter | None = None,
        checkpoint_with: Literal["optimizer"] | None = "optimizer",
    ) -> None:
        check_model(model)
        check_carrier(checkpoint_with)
        self.model = model
        chosen = as_method(method)
        self.budget = as_budget(budget)
        self.pattern = as_pattern(pattern)
        optimizers = as_optimizers(optimizer)
        self.total_steps = check_steps(total_steps, chosen)
        common = self.budget, self.total_steps, self.pattern, include, exclude
        self.run: MaskingRun | GrowingRun
        self._carrier: Carrier | None = None
        carries = checkpoint_with is not None
        with unchanged_on_error(model) if carries and brings_state(optimizers) else nullcontext():
            if isinstance(chosen, GrowthMethod):
                self.run = GrowingRun(model, optimizers, chosen, *common)
            else:
                self.run = MaskingRun(model, optimizers, chosen, *common)
            self.run.steps.note_handles(optimizer)
            if carries:
                self._carrier = self._carried()
            else:
                ignore_brought(optimizers)

    @property
    def method(self) -> MaskingMethod | GrowthMethod:
        """The method, with the settings that the run was begun with."""
        return self.run.method

    @property
    def step(self) -> int:
        """Optimizer steps completed."""
        return self.run.steps.done

    @property
    def weights(self) -> Sequence[MaskedWeight | GrowingLayer]:
        """The prunable weights, in the order of the model."""
        return self.run.weights

    @property
    def density(self) -> float:
        """Kept fraction of the prunable weights, counted in what the model holds now.

        Raises:
            StateError: The model has other parameters now.
        """
        return self.run.facts.density

    @property
    def finalized(self) -> bool:
        """Whether `finalize` was called."""
        return not self.run.attached

    def layers(self) -> list[LayerSummary]:
        """Return what each prunable weight keeps, group by group."""
        return self.run.facts.layers()

    def monitor(self) -> dict[str, float]:
        """Return density and the method's numbers, averaged over groups of weights."""
        return self.run.facts.monitor()

    def budgets(self) -> list[tuple[str, GroupBudget]]:
        """Return what each group of weights may keep, after the names of its weights."""
        return self.run.facts.budgets()

    def progress_after(self, step: int) -> float:
        """Say how far the density has come after a step: from everything, 0, to the budget, 1."""
        return self.run.progress_after(step)

    def moves_after(self, step: int) -> bool:
        """Say whether what is kept is chosen anew after a step."""
        return self.run.moves_after(step)

    def selected(self) -> dict[str, Tensor]:
        """Return what of each weight is kept, to compare with later; see `churn`."""
        return self.run.facts.selected()

    def churn(self, before: Mapping[str, Tensor]) -> float:
        """Return the share of what is selected that has changed since `selected` returned this."""
        return self.run.facts.churn(before)

    @property
    def coverage(self) -> Coverage:
        """How much of the model the budget speaks of; `str` says it in one line."""
        return self.run.facts.coverage

    @property
    def at_budget(self) -> bool:
        """Whether the masks hold the budget now; what the model holds, see `density`."""
        return self.run.at_budget

    @property
    def moves(self) -> bool:
        """Whether what is kept is chosen anew at any time in the rest of the run."""
        return self.run.moves

    def extend(self, total_steps: int) -> None:
        """Let the run have more steps, or fewer: the rest of the schedule is planned anew.

        Density and sharpness go on as in a run that had this length from the beginning.

        Args:
            total_steps: Optimizer steps of the whole run, with those that are done.

        Raises:
            ScheduleError: So many are done already, or the run has no schedule.
            StateError: Nothing moves any more; further steps train what is kept.
        """
        self._require_attached()
        found = check_steps(total_steps, self.method)
        if self.total_steps is None or found is None or found <= self.step:
            raise ScheduleError(
                f"extend(total_steps={total_steps}) after step {self.step} of {self.total_steps}: "
                "give more steps than are done, to a run with a schedule."
            )
        self._require_moving("total_steps")
        self.run.extend(found)
        self.total_steps = found

    def retarget(self, budget: Budget | float) -> None:
        """Go on to another budget, from the next selection on.

        Args:
            budget: The budget, with the same allocation; a number is another density of the budget
                of now.

        Raises:
            BudgetError: It does not fit the model.
            StateError: Nothing moves any more, weights would be grouped otherwise, or the layers
                are always-sparse.
        """
        self._require_attached()
        given = isinstance(budget, Budget) or self.budget.latency_ms is not None
        chosen = as_budget(budget) if given else self._of_density(budget)
        self._require_moving("budget")
        self.run.retarget(chosen)
        self.budget = chosen

    def _of_density(self, density: Any) -> Budget:
        return dataclasses.replace(
            self.budget, density=as_budget(density).density, sparsity=None, sample_input=None
        )

    def begin_pass(self, training: bool) -> None:
        """Show the model as a pass is to see it, where passes go past the model's own call.

        Methods that sample (gates) do so before each training pass. They notice calls of the model
        that the sparsifier was made with, and closures; a loop that calls only parts of it says by
        this that a pass follows.

        Args:
            training: Whether it is a training pass; others see the plain sparse weights.
        """
        if not self.finalized:
            self.run.begin_pass(training)

    def project(self, model: Target) -> Target:
        """Make a copy of the model exact: an average, or the best weights of a run.

        What the masks of now prune becomes zero in it, in place. It may be called before and after
        `finalize`.

        Args:
            model: A copy, also inside a `torch.optim.swa_utils.AveragedModel` or another wrapper;
                or a state dict.

        Returns:
            The same object.

        Raises:
            StateError: It is no copy of the model, or layers are always-sparse: these have
                connections of their own.
        """
        return self.run.facts.project(model)

    def finalize(self, keep: Literal["own", "model"] | None = None) -> None:
        """Leave an exactly sparse model and no hook; the sparsifier is done.

        Called before the schedule has reached the budget, it prunes the rest at once, with a
        warning. Always-sparse layers stay so, see `always_sparse.to_dense`. A second call does
        nothing, as long as the model still has its zeros.

        Args:
            keep: What becomes of weights that something else has written since the last step
                (clipping, an average, float32 masters): with `"model"` the model keeps what it
                holds, where masks keep it, and all of it if it is at the budget by zeros of its own
                (an earlier checkpoint of the run); with `"own"` it gets back what the last step
                left. By default such weights are refused. `"model"` also ends a run whose
                parameters were exchanged.

        Raises:
            StateError: Weights were written or exchanged, and `keep` does not say what to do; or
                the model was trained after a first call.
        """
        if keep not in (None, "own", "model"):
            raise StateError(f"keep={keep!r}; known: 'own', 'model'.")
        self.run.finalize(keep)
        if self._carrier is not None:
            self._carrier.strip()

    def state_dict(self) -> dict[str, Any]:
        """Return everything a bit-for-bit resume needs, as plain values and tensors.

        The model's and the optimizer's own state dicts are saved beside it; the latter holds this
        one, unless the sparsifier was made with `checkpoint_with=None`.
        """
        self._require_attached()
        return self.run.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, after the model's own state was loaded.

        Raises:
            StateError: The state is of another model, method, budget or schedule. Nothing is
                changed then.
        """
        self._require_attached()
        if not isinstance(state, Mapping):
            raise StateError(
                f"A state is what state_dict() returned, not a {type(state).__name__}."
            )
        with torch.inference_mode(False):  # what is kept is to be trained
            self.run.prepare(state)()
        if self._carrier is not None:
            self._carrier.loaded()

    def _carried(self) -> Carrier:
        try:
            return Carrier(self.run)
        except BaseException:
            self.run.abandon()
            raise

    def __getattr__(self, name: str) -> Any:
        """Find what version 0.1 called otherwise."""
        if name not in _NAMES_OF_0_1:
            raise AttributeError(f"A Sparsifier has no attribute {name!r}.")
        renamed(f"Sparsifier.{name}", f"Sparsifier.{_NAMES_OF_0_1[name]}", stacklevel=3)
        return operator.attrgetter(_NAMES_OF_0_1[name])(self)

    def _require_moving(self, what: str) -> None:
        if isinstance(self.run, MaskingRun) and not self.moves:
            raise StateError(
                f"The masks are fixed since step {self.step} at the latest: another {what} would "
                "change nothing. More steps train what is kept; make a new sparsifier to prune on "
                "from here."
            )

    def _require_attached(self) -> None:
        if self.finalized:
            raise StateError("finalize() was called: the run is over. Make a new sparsifier.")

    def __repr__(self) -> str:
        return (
            f"Sparsifier({self.method}, pattern={self.pattern}, {self.coverage}, "
            f"step={self.step}/{self.total_steps})"
        )
