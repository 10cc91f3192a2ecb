r"""`Refiner`: trains gates further on labels from backward elimination.

    L   =  MSE  +  Σ_i≠j c_ij softplus(±K g_ij) / K          + where the gate is to be closed
    c   =  1                                                  where it is closed, or was eliminated
    c   =  min((worth - price) / price, R)                    where it is left

in units of a state's error. By opening and closing one gate of each state now and then (`toggling`)
gates learn, too, but in `CreateLite` reads of objects that are merely near stay; here all gates of
a state have their say, and it does not fade where a gate is surely open. Elimination knows what
came, and a gate must do without: what it learns is the mean over states that look the same to it. A
needed gate weighs by how much it is worth more than the price, up to R times as much as one too
many. Gates of tokens to themselves have no price: there c is worth / price, where they are open.

The model to start from has learned its gates by `Learner`: where all are open, none is needed.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from spartan.errors import StateError, WorldError
from spartan.seeds import derive_seed
from spartan.world_model.constraints import ErrorBudget
from spartan.world_model.elimination import eliminate
from spartan.world_model.learning import Learner, Recipe
from spartan.world_model.model import Prediction, WorldModel
from spartan.world_model.transitions import Transitions

_STATES = 100_000  # to be labelled
_PREDICTIONS = 10_000_000  # that labels may take: minutes on two cores
_STEEPNESS = 4.0  # K: the loss lies within ln 2 / 4 = 0.17 of the hinge
_MOST = 8.0  # R: one needed gate weighs at most as much as eight needless ones


class Refiner(Learner):
    """Trains a model further, with the gates that its own states need as labels.

    The result is the last model within the error, as measured on held-out data; if there is none,
    the one with the least error, and that may be the one it began with.

    Args:
        model: Of mode `"sparse"`, trained; in place. What it is now decides the labels.
        data: Transitions for training; up to 100,000 of them, drawn by the seed, are labelled, and
            trained on. Labels take up to some minutes.
        held_out: Transitions to choose the result by.
        recipe: How to train; gates stay as sharp as they are.
        budget: The error allowed.
        price: What a gate must be worth, in units of a state's error (see `eliminate`).
        seed: Decides states, batches and gates.

    Raises:
        WorldError: Data and model do not fit, the price is not positive, or so many gates are open
            that labels would take too long.
    """

    def __init__(
        self,
        model: WorldModel,
        data: Transitions,
        held_out: Transitions,
        recipe: Recipe,
        budget: ErrorBudget,
        price: float = 0.03,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(derive_seed(seed, "world/labelled", 0))
        order = torch.randperm(len(data), generator=generator).to(data.states.device)
        super().__init__(model, data[order[:_STATES]], held_out, recipe, budget, seed)
        self.constraint = None
        _refuse_many(model, self.data)
        left, worth = eliminate(model, self.data, price)
        self.labels = label(left, worth, price)
        self.origin = _digest(model)
        self.check()  # what it begins with is a result, too
        self._began = math.inf if self.best is None else self.best["error"]

    def finish(self) -> None:
        """Leave the model with what was best, and warn if that is what it began with."""
        super().finish()
        if self.best is not None and self.best["error"] == self._began:
            warnings.warn(
                "No step of the refinement was better within the error budget: the model is as it "
                "was. Refine for longer, or allow a larger error.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue, together with the model it began with."""
        return super().state_dict() | {"origin": self.origin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue.

        Raises:
            StateError: It began with another model, whose labels would be others.
        """
        if state.get("origin") != self.origin:
            raise StateError(
                "This refinement began with another model: build the Refiner from the model that "
                "was given to it at first, and load this state then."
            )
        super().load_state_dict(state)

    def set_gates(self) -> None:
        """Leave them as they are."""

    def gate_loss(self, rows: Tensor, batch: Transitions, prediction: Prediction) -> Tensor:
        """Return the loss of the gates, in the mean over objects.

        Args:
            rows: Which of the data the batch is, `[B]`.
            batch: B transitions.
            prediction: What the model said of them.
        """
        labels = self.labels[:, rows] * prediction.present
        missed = softplus(_STEEPNESS * prediction.logits * labels.sign()) / _STEEPNESS
        return (labels.abs() * missed).sum() / batch.mask.sum()


@torch.no_grad()
def _refuse_many(model: WorldModel, data: Transitions) -> None:
    """Raise if labels take too long: a state with g gates open takes up to g (g + 1) / 2 errors."""
    model.eval()
    some = data[slice(0, 1000)]
    gates = model(some.states, some.environment, some.mask).adjacency.sum(0)
    opened = gates.sum((-2, -1)) - gates.diagonal(dim1=-2, dim2=-1).sum(-1)
    each = float((opened * (opened + 1) / 2).mean())
    if each * len(data) > _PREDICTIONS:
        raise WorldError(
            f"{float(opened.mean()):.1f} gates between tokens are open in the mean state, and what "
            f"{len(data):,} states need of them would take too long to find out. Train the model "
            "for longer under its budget first, until few gates are open, or give fewer states."
        )


def _digest(model: WorldModel) -> str:
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.cpu().numpy().tobytes())
    return found.hexdigest()


def label(left: Tensor, worth: Tensor, price: float) -> Tensor:
    """Return ±c, above 0 where a gate is to be closed, same shape.

    Gates of tokens to themselves cost nothing; one that is closed has no say.

    Args:
        left: A of the gates that are left, 0 or 1, `[…, n, n]`.
        worth: What closing them would cost, ∞ where a gate is closed, same shape.
        price: What they must be worth.
    """
    opened = left > 0
    needed = ((worth - price) / price).clamp(0, _MOST)
    between = torch.where(opened, -needed, 1.0)
    alone = torch.where(opened, -(worth / price).clamp(-_MOST, _MOST), 0.0)
    own = torch.eye(left.shape[-1], dtype=torch.bool, device=left.device)
    return torch.where(own, alone, between)
