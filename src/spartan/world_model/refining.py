r"""Gates that learn which of them each state needs, from what backward elimination left.

    L   =  MSE  +  Σ_ij c_ij softplus(±K g_ij) / K          + where the gate is to be closed
    c   =  1                                                 where it is closed, or was eliminated
    c   =  min((worth - price) / price, R)                   where it is left

in units of a state's error. By opening and closing one gate of each state now and then (`toggling`)
gates learn, too, but where there are many objects the estimate is so noisy that reads of objects
that are merely near stay; here every gate of every state has its say in each step, and it does not
fade where a gate is surely open. Elimination knows what came, and a gate must do without: what it
learns is the mean over states that look the same to it. A needed gate weighs as much as it is
worth, up to R times as much as one too many.

The model to start from has learned its gates by `Learner`: where all are open, none is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from spartan.errors import WorldError
from spartan.seeds import derive_seed
from spartan.world_model.constraints import EdgeBudget, ErrorBudget
from spartan.world_model.elimination import eliminate
from spartan.world_model.learning import Learner, Recipe
from spartan.world_model.model import Prediction, WorldModel
from spartan.world_model.transitions import Transitions

_STATES = 100_000  # labelled, or as many as take so many predictions
_PREDICTIONS = 5_000_000
_STEEPNESS = 4.0  # K
_MOST = 8.0  # R


class Refiner(Learner):
    """Trains a model further, with the gates that its own states need as labels.

    Under an error budget, what comes out is within it if what went in was.

    Args:
        model: Of mode `"sparse"`, trained; in place. What it is now decides the labels.
        data: Transitions for training; up to 100,000 of them are labelled, and trained on;
            fewer where most gates are open, since labels take longer then.
        held_out: Transitions to choose the result by.
        recipe: How to train; gates stay as sharp as they are.
        budget: What the model was trained under.
        price: What a gate must be worth, in units of a state's error (see `eliminate`).
        seed: Decides states, batches and gates.

    Raises:
        WorldError: Data and model do not fit, or the price is not positive.
    """

    def __init__(
        self,
        model: WorldModel,
        data: Transitions,
        held_out: Transitions,
        recipe: Recipe,
        budget: ErrorBudget | EdgeBudget,
        price: float = 0.03,
        seed: int = 0,
    ) -> None:
        if not price > 0:
            raise WorldError(f"price={price} must be positive.")
        generator = torch.Generator().manual_seed(derive_seed(seed, "world/labelled", 0))
        order = torch.randperm(len(data), generator=generator).to(data.states.device)
        some = data[order[: _affordable(model, data[order[:1000]])]]
        super().__init__(model, some, held_out, recipe, budget, seed)
        self.constraint = None
        left, worth = eliminate(model, some, price)
        self.labels = label(left, worth, price)
        self.check()  # what it starts from stays the best, unless others are within the budget

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
def _affordable(model: WorldModel, some: Transitions) -> int:
    """Return how many states to label; one with g gates open takes up to g (g + 1) / 2 predictions.

    Args:
        model: Whose gates.
        some: States like those to be labelled.
    """
    model.eval()
    gates = model(some.states, some.environment, some.mask).adjacency.sum(0)
    opened = gates.sum((-2, -1)) - gates.diagonal(dim1=-2, dim2=-1).sum(-1)
    each = (opened * (opened + 1) / 2).mean()
    return int(min(_STATES, max(1000.0, _PREDICTIONS / max(1.0, float(each)))))


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
