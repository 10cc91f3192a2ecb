"""`Sparsify`: a Lightning `Trainer` prunes as it trains, saves and resumes."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from spartan.budgets.budget import Budget
from spartan.errors import MissingExtraError, PrunableError, ScheduleError
from spartan.integrations.attaching import Numbers, attach
from spartan.methods.growth.contract import GrowthMethod
from spartan.methods.registry import AnyMethod
from spartan.sparsifier.sparsifier import Sparsifier
from spartan.weights.names import plain_name
from spartan.weights.patterns import Pattern
from spartan.weights.prunable import NameFilter

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
except ImportError as error:
    raise MissingExtraError(
        "spartan.integrations.lightning needs lightning: pip install 'spartan-torch[lightning]'"
    ) from error


class Sparsify(Callback):
    """Keeps a module at an exact budget while a `Trainer` fits it: `Trainer(callbacks=[this])`.

    The run is as long as the trainer plans, in automatic and in manual optimisation. Lightning's
    own checkpoints hold the sparsifier's state in that of the optimizer, and `fit(ckpt_path=…)`
    goes on bit for bit, also with more epochs. A `ModelCheckpoint` begins anew to look for the best
    model once the budget is reached, and what averaging callbacks save and leave is pruned by the
    masks. `self.log` gets density, kept weights, churn and the method's numbers every
    `log_every_n_steps`. After `fit` the module is exactly sparse, without hooks.

    Args:
        method: How masks are found: a method of `spartan.methods`, or its name.
        budget: How much may stay; a number is the density of a `Budget`.
        module: Which part of the `LightningModule` to prune, by its name there; by default all.
        pattern: What a unit is, see `Sparsifier`.
        include: Which parameters are prunable, see `find_prunable`.
        exclude: Which are not.
        total_steps: Optimizer steps of the whole run, where the trainer cannot tell.

    Attributes:
        sparsifier: That of the last call of `fit()`; None before.
    """

    def __init__(
        self,
        method: AnyMethod | str,
        budget: Budget | float,
        module: str | None = None,
        *,
        pattern: Pattern | str | None = None,
        include: NameFilter | None = None,
        exclude: NameFilter | None = None,
        total_steps: int | None = None,
    ) -> None:
        self._settings = {
            "method": method,
            "budget": budget,
            "pattern": pattern,
            "include": include,
            "exclude": exclude,
        }
        self._module, self._total_steps = module, total_steps
        self.sparsifier: Sparsifier | None = None
        self._numbers: Numbers | None = None
        self._reached = False
        self._logged = 0

    # From the beginning to the end ---------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Become the last callback: averages are written at the end by others, before."""
        own: Any = trainer
        # A new list: Lightning is walking through the old one.
        own.callbacks = [one for one in own.callbacks if one is not self] + [self]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the sparsifier; a checkpoint, if there is one, is loaded already."""
        self.sparsifier = attach(
            self._part(pl_module),
            trainer.optimizers,
            self._total_steps or _planned_steps(trainer),
            **self._settings,
        )
        self._numbers = Numbers(self.sparsifier)
        self._reached, self._logged = self.sparsifier.at_budget, self.sparsifier.step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave an exactly sparse module without hooks."""
        assert self.sparsifier is not None
        self.sparsifier.finalize(keep="model")

    # Passes and steps ----------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let methods that sample draw: Lightning calls no module, but its `training_step`."""
        if self.sparsifier is not None:
            self.sparsifier.begin_pass(training=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the plain sparse weights be evaluated."""
        if self.sparsifier is not None:
            self.sparsifier.begin_pass(training=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and forget the best models of before the budget once it is reached."""
        assert self.sparsifier is not None
        if not self._reached and self.sparsifier.at_budget:
            self._reached = True
            for one in trainer.checkpoint_callbacks:
                if isinstance(one, ModelCheckpoint):
                    _forget_best(one)
        step, every = self.sparsifier.step, getattr(trainer, "log_every_n_steps", 0)
        if every and step != self._logged and step % every == 0:
            self._logged = step
            assert self._numbers is not None
            pl_module.log_dict(self._numbers.take())

    # Checkpoints ---------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Prune the average that another callback has put in the place of the weights."""
        sparsifier = self.sparsifier
        if sparsifier is None or isinstance(sparsifier.method, GrowthMethod):
            return
        prefix = "" if self._module is None else f"{self._module}."
        found: dict[str, Any] = checkpoint["state_dict"]
        keys = {plain_name(key).removeprefix(prefix): key for key in found}
        keys = {w.name: keys[w.name] for w in sparsifier.weights if w.name in keys}
        own = {p.untyped_storage().data_ptr() for p in pl_module.parameters()}
        theirs = any(found[key].untyped_storage().data_ptr() not in own for key in keys.values())
        if theirs and len(keys) == len(sparsifier.weights):
            part = sparsifier.project({name: found[key].clone() for name, key in keys.items()})
            checkpoint["state_dict"] = {**found, **{keys[name]: w for name, w in part.items()}}

    def _part(self, pl_module: LightningModule) -> nn.Module:
        if self._module is None:
            return pl_module
        try:
            return pl_module.get_submodule(self._module)
        except AttributeError as error:
            known = ", ".join(repr(name) for name, _ in pl_module.named_children())
            raise PrunableError(
                f"module={self._module!r} is no part of the {type(pl_module).__name__}; it has "
                f"{known}."
            ) from error


def _planned_steps(trainer: Trainer) -> int:
    """Return for how many optimizer steps a trainer plans to run."""
    try:
        planned = trainer.estimated_stepping_batches
    except Exception as error:
        raise ScheduleError(
            f"The trainer cannot tell how many steps there will be ({error}): give "
            "Sparsify(total_steps=…)."
        ) from error
    if planned < 1 or math.isinf(planned):
        raise ScheduleError(
            f"The trainer plans {planned} steps: set max_epochs or max_steps, or give "
            "Sparsify(total_steps=…)."
        )
    return int(planned)


def _forget_best(checkpoint: ModelCheckpoint) -> None:
    """Let a `ModelCheckpoint` look for the best model anew; the files of now stay."""
    checkpoint.best_k_models = {}
    checkpoint.kth_best_model_path = checkpoint.best_model_path = ""
    checkpoint.best_model_score = None
