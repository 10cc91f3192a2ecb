"""`SparsifierCallback`: a transformers `Trainer` prunes as it trains, saves and resumes."""

from __future__ import annotations

from typing import Any

from spartan import always_sparse
from spartan.always_sparse.conversion import sparse_layers
from spartan.budgets.budget import Budget
from spartan.errors import MissingExtraError, ScheduleError
from spartan.integrations.attaching import Numbers, attach
from spartan.methods.registry import AnyMethod
from spartan.sparsifier.sparsifier import Sparsifier
from spartan.weights.patterns import Pattern
from spartan.weights.prunable import NameFilter

try:
    from transformers import (
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
except ImportError as error:
    raise MissingExtraError(
        "spartan.integrations.transformers needs transformers: "
        "pip install 'spartan-torch[transformers]'"
    ) from error


class SparsifierCallback(TrainerCallback):
    """Keeps the model of a `Trainer` at an exact budget: `Trainer(…, callbacks=[this])`.

    The run is as long as the trainer plans. Its checkpoints hold the sparsifier's state in that of
    the optimizer, and `resume_from_checkpoint` goes on bit for bit, also with more epochs. The best
    model is chosen among those at the budget. Log entries get density, kept weights, churn since
    the entry before, and the method's numbers. After `train()` the model is exactly sparse, without
    hooks; always-sparse layers are made dense, so that `save_model` writes an ordinary folder.

    Args:
        method: How masks are found: a method of `spartan.methods`, or its name.
        budget: How much may stay; a number is the density of a `Budget`.
        pattern: What a unit is, see `Sparsifier`.
        include: Which parameters are prunable, see `find_prunable`.
        exclude: Which are not.

    Attributes:
        sparsifier: That of the last call of `train()`; None before.
    """

    def __init__(
        self,
        method: AnyMethod | str,
        budget: Budget | float,
        *,
        pattern: Pattern | str | None = None,
        include: NameFilter | None = None,
        exclude: NameFilter | None = None,
    ) -> None:
        self._settings = {
            "method": method,
            "budget": budget,
            "pattern": pattern,
            "include": include,
            "exclude": exclude,
        }
        self.sparsifier: Sparsifier | None = None
        self._numbers: Numbers | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Make the sparsifier; a checkpoint, if there is one, is loaded already."""
        if state.max_steps < 1:
            raise ScheduleError("The trainer plans no steps: set max_steps or num_train_epochs.")
        self.sparsifier = attach(
            kwargs["model"], kwargs["optimizer"], state.max_steps, **self._settings
        )
        self._numbers = Numbers(self.sparsifier)
        self._forget_best(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let no model of before the budget be the best."""
        self._forget_best(state)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let no model of before the budget be the best."""
        self._forget_best(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Add the sparsifier's numbers to entries of training."""
        running = self.sparsifier is not None and not self.sparsifier.finalized
        logs: dict[str, float] = kwargs["logs"]
        if running and "loss" in logs and state.is_world_process_zero:
            assert self._numbers is not None
            found = self._numbers.take()
            logs.update(found)
            state.log_history[-1].update(found)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leave an exactly sparse, ordinary model: the last one, or the best, which is loaded."""
        assert self.sparsifier is not None
        self.sparsifier.finalize(keep="model")
        if sparse_layers(kwargs["model"]):
            always_sparse.to_dense(kwargs["model"])

    def _forget_best(self, state: TrainerState) -> None:
        if self.sparsifier is not None and not self.sparsifier.at_budget:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
