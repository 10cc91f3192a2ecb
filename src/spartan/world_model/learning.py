"""`Learner`: trains a transition model, and its graph under an error or edge budget."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from spartan.errors import NonFiniteError, WorldError
from spartan.seeds import derive_seed
from spartan.world_model.constraints import Constraint, EdgeBudget, ErrorBudget, unsettled
from spartan.world_model.model import Prediction, WorldModel
from spartan.world_model.paths import Rows
from spartan.world_model.toggling import gate_slopes, squared_errors
from spartan.world_model.transitions import Transitions

_EVALUATED = 1000  # transitions at a time


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: Batches.
        batch_size: Transitions of a batch.
        lr: Adam's rate, after a warm-up of 200 steps and until it falls to 0 in the last 60 %.
        sharpness: Factor that gate logits end with, reached from 1 between 10 % and 80 % of the
            steps. A gate that must surely be open up to the rim of a region overshoots it by as
            much as the logit needs to grow; sharpening shrinks that.
        opening: What gate logits are raised by at first, down to 0 after 30 % of the steps: until
            something is known, gates that open at random hide what depends on what.
        severed: Share of the states of a batch in which each gate is closed with probability 1/2.
            What is predicted without a sender has to hold then whatever the sender is. Otherwise
            a closed gate is itself a message, and reading only half of what matters is enough.
        checks: How many times the graph is compared with held-out data.
    """

    steps: int = 12_000
    batch_size: int = 128
    lr: float = 1e-3
    sharpness: float = 40.0
    opening: float = 3.0
    severed: float = 0.25
    checks: int = 40

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.checks) < 1:
            raise WorldError("steps, batch_size and checks must be at least 1.")
        if not self.lr > 0 or not self.sharpness >= 1:
            raise WorldError(
                f"lr={self.lr} must be positive, and sharpness={self.sharpness} at least 1."
            )
        if not 0 <= self.severed < 1:
            raise WorldError(f"severed={self.severed} must be at least 0 and below 1.")

    def lr_at(self, step: int) -> float:
        """Return the rate of one step."""
        warm = min(1.0, (step + 1) / 200)
        return self.lr * warm * unsettled(step / self.steps)

    def opening_at(self, step: int) -> float:
        """Return what gate logits are raised by in one step."""
        return self.opening * max(0.0, 1 - step / (0.3 * self.steps))

    def sharpness_at(self, step: int) -> float:
        """Return the factor of gate logits in one step."""
        progress = (step / self.steps - 0.1) / 0.7
        return float(self.sharpness ** min(1.0, max(0.0, progress)))


def prediction_error(prediction: Tensor, data: Transitions, scale: Tensor) -> Tensor:
    """Return the mean squared error in units of σ, over the objects that are there."""
    return squared_errors(prediction, data, scale).sum() / data.mask.sum()


class Learner:
    """Trains a model; every batch and gate is drawn from the seed and the number of the step.

    Args:
        model: What is trained, in place.
        data: Transitions for training.
        held_out: Transitions to choose the result by, under a budget.
        recipe: How to train.
        budget: None trains for the error alone.
        seed: Decides batches and gates.
        rows: Which paths are penalised.

    Raises:
        WorldError: Data and model do not fit, or a model without gates is given a budget.
    """

    def __init__(
        self,
        model: WorldModel,
        data: Transitions,
        held_out: Transitions,
        recipe: Recipe,
        budget: ErrorBudget | EdgeBudget | None = None,
        seed: int = 0,
        rows: Rows = "decoded",
    ) -> None:
        self.model = model
        self.data, self.held_out = data, held_out
        self.recipe, self.seed = recipe, seed
        config = self.model.config
        if budget is not None and config.mode != "sparse":
            raise WorldError(f"mode={config.mode!r} has no gates to meet {budget} with.")
        if data.following.shape[-1] != config.changing:
            raise WorldError(
                f"The data has {data.following.shape[-1]} features that change, the model "
                f"{config.changing}."
            )
        if int(data.environment.max()) >= config.environments:
            raise WorldError(
                f"The data is of {int(data.environment.max()) + 1} environments, the model of "
                f"{config.environments}."
            )
        self.step = 0
        self.optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
        objects = data.states.shape[1]
        self.budget = budget
        self.constraint = None if budget is None else Constraint(budget, objects, rows)
        self.best: dict[str, Any] | None = None
        self._generator = torch.Generator(device=data.states.device)

    @property
    def done(self) -> bool:
        """Whether all steps were taken."""
        return self.step >= self.recipe.steps

    def advance(self) -> dict[str, float]:
        """Take one step, and return what was measured in it.

        Raises:
            NonFiniteError: The error is NaN or infinite.
        """
        recipe, generator = self.recipe, self._generator
        generator.manual_seed(derive_seed(self.seed, "world", self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(self.step)
        shape = (recipe.batch_size,)
        device = self.data.states.device
        rows = torch.randint(len(self.data), shape, generator=generator, device=device)
        batch = self.data[rows]
        self.model.train()
        self.set_gates()
        gates = generator if self.model.config.mode == "sparse" else None
        count = int(recipe.severed * recipe.batch_size)
        prediction: Prediction = self.model(
            batch.states,
            batch.environment,
            batch.mask,
            gates,
            severed=_sever(batch.states, count, generator),
        )
        error = prediction_error(prediction.states, batch, self.model.scale)
        whole, rest = prediction.rest(count), batch[slice(count, None)]
        seen = prediction_error(whole.states.detach(), rest, self.model.scale).item()
        if self.constraint is None:
            loss, row = error, {"error": seen}
        else:
            progress = self.step / recipe.steps
            loss, row = self.constraint.loss(error, seen, whole.adjacency, progress)
        if not math.isfinite(row["error"]):
            raise NonFiniteError(
                f"The prediction error is {row['error']} in step {self.step}: lower lr."
            )
        if gates is not None:
            loss = loss + self.gate_loss(rows, batch, prediction)
        self.optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return row

    def set_gates(self) -> None:
        """Set how sharp the gates are in the next step, and how far they are opened."""
        self.model.sharpness.fill_(self.recipe.sharpness_at(self.step))
        self.model.opening.fill_(self.recipe.opening_at(self.step))

    def gate_loss(self, rows: Tensor, batch: Transitions, prediction: Prediction) -> Tensor:
        """Return what leads the gates, apart from a price.

        Args:
            rows: Which of the data the batch is, `[B]`.
            batch: B transitions.
            prediction: What the model said of them.
        """
        slopes = gate_slopes(self.model, batch, prediction, self._generator)
        return (slopes * prediction.adjacency).sum()

    def check(self) -> dict[str, float]:
        """Measure on held-out data, and remember the model if it is within its error budget.

        Returns:
            Error and edges, with gates as they are when not training.
        """
        error, edges = measure(self.model, self.held_out)
        budget = self.budget
        if isinstance(budget, ErrorBudget):
            # The last model within the budget is the most settled one; before there is any, the
            # one with the least error.
            kept = error <= budget.limit
            better = (
                self.best is None or kept or (not self.best["kept"] and error < self.best["error"])
            )
            if better and math.isfinite(error):
                weights = {name: value.clone() for name, value in self.model.state_dict().items()}
                self.best = {"kept": kept, "error": error, "model": weights}
        return {"held_out_error": error, "held_out_edges": edges}

    @property
    def checks_now(self) -> bool:
        """Whether the last step was one after which `check` is due."""
        every = max(1, self.recipe.steps // self.recipe.checks)
        return self.step % every == 0 or self.done

    def finish(self) -> None:
        """Leave the model with what was best: within its error budget, or exactly at its edges."""
        self.model.eval()
        budget = self.budget
        if isinstance(budget, EdgeBudget):
            meet_edges(self.model, self.held_out, budget.limit)
        elif isinstance(budget, ErrorBudget):
            if self.best is None:
                self.check()
            if self.best is not None:
                self.model.load_state_dict(self.best["model"])
            self._warn_of_empty_graph(budget)

    def _warn_of_empty_graph(self, budget: ErrorBudget) -> None:
        error, edges = measure(self.model, self.held_out)
        if edges == 0 and error > 2 * budget.limit:
            warnings.warn(
                f"No edge is left, and the error is {error:.4g} where {budget.limit:.4g} is "
                "allowed: the gates closed before the dynamics were learned. Train for longer, "
                "or allow a larger error.",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue bit for bit."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "constraint": None if self.constraint is None else self.constraint.state_dict(),
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.constraint is not None:
            self.constraint.load_state_dict(state["constraint"])
        self.best = state["best"]
        self.step = state["step"]


def _sever(states: Tensor, count: int, generator: torch.Generator) -> Tensor | None:
    """Return which gates are closed at random, in the first of the states, `[B, N + 1, N + 1]`."""
    if count == 0:
        return None
    tokens = states.shape[1] + 1
    severed = torch.zeros(len(states), tokens, tokens, dtype=torch.bool, device=states.device)
    chance = torch.rand((count, tokens, tokens), generator=generator, device=states.device)
    severed[:count] = chance < 0.5
    return severed


@torch.no_grad()
def measure(model: WorldModel, data: Transitions) -> tuple[float, float]:
    """Return error and mean number of edges, with gates as they are when not training."""
    model.eval()
    errors, edges, objects = 0.0, 0, 0
    for begin in range(0, len(data), _EVALUATED):
        part = data[begin : begin + _EVALUATED]
        prediction: Prediction = model(part.states, part.environment, part.mask)
        there = int(part.mask.sum())
        errors += float(prediction_error(prediction.states, part, model.scale)) * there
        objects += there
        edges += int(prediction.graph().edges.sum())
    return errors / objects, edges / len(data)


def meet_edges(model: WorldModel, data: Transitions, limit: float) -> None:
    """Shift the gate logits between objects so that there are as many edges as allowed, none more.

    Where there are never more, all gates are opened.

    Args:
        model: A sparse transition model; its `gate_shift` is set.
        data: States over which edges are counted.
        limit: Mean edges of a state.
    """
    low, high = -1.0, 1.0

    def edges_at(shift: float) -> float:
        model.gate_shift.fill_(shift)
        return measure(model, data)[1]

    while edges_at(low) > limit:
        low *= 2
    while edges_at(high) <= limit:
        high *= 2
        if high > 1e6:
            return
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if edges_at(middle) <= limit else (low, middle)
    edges_at(low)
