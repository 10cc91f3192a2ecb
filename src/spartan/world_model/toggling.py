r"""Local expectation gradient of hard gates: predicts again with single gates flipped.

    ∂ E[error] / ∂ P(A_ij = 1)  =  E[error with A_ij = 1  -  error with A_ij = 0]

with the other gates held as they were drawn. The derivative at A_ij itself is another thing: with a
gate open that is needed, the error is at its least and its derivative 0, and such gates drift shut.
What an earlier gate does to the logits of later ones is not in it.

Measured is the difference, for some gates of each state, by predicting once more: in half of the
states one gate of each reader in the last layer, since it changes that reader's prediction only; in
the others one gate of one reader in an earlier layer. Gates are chosen the rather the less it is
decided whether they are open, √(P (1 - P)); each counts by 1 / the probability that it is chosen,
so that the mean is the gradient of all.

This is the local expectation gradient of Titsias, Lázaro-Gredilla, "Local Expectation Gradients for
Black Box Variational Inference", NeurIPS 2015, for some gates of each state.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from spartan.world_model.model import Prediction, WorldModel
from spartan.world_model.transitions import Transitions


def gate_slopes(
    model: WorldModel,
    data: Transitions,
    prediction: Prediction,
    generator: torch.Generator,
    tokens: Tensor | None = None,
) -> Tensor:
    """Return an estimate of the gradient of the mean error with respect to P(A = 1).

    Its mean is the gradient, the other gates held.

    Args:
        model: Predicts once more, with other gates.
        data: B transitions.
        prediction: What the model said of them.
        generator: Chooses gates.
        tokens: Of the interventions, `[B, d]`, where they are not those of `data`.

    Returns:
        `[L, B, N + 1, N + 1]`, 0 for most gates; to be multiplied by their adjacency, whose own
        gradient leads on to the logits.
    """
    adjacency = prediction.adjacency.detach()
    weights = _choose(prediction.present, prediction.probability, generator)
    toggled = torch.where(weights > 0, 1 - adjacency, adjacency)
    with torch.no_grad():
        environment = data.environment if tokens is None else tokens
        again = model(data.states, environment, data.mask, adjacency=toggled)
        change = squared_errors(again.states, data, model.scale)
        change -= squared_errors(prediction.states, data, model.scale)
    # Nothing is predicted from the intervention's token.
    own = pad(change, (0, 1))
    every = own.sum(-1, keepdim=True).expand_as(own)
    credit = torch.stack([*[every] * (len(adjacency) - 1), own])
    return weights * credit.unsqueeze(-1) * (1 - 2 * adjacency) / data.mask.sum()


def squared_errors(predicted: Tensor, data: Transitions, scale: Tensor) -> Tensor:
    """Return the mean squared error of each object in units of σ, `[B, N]`; 0 of those not there.

    Args:
        predicted: `[B, N, D]`.
        data: What came.
        scale: σ, `[D]`.
    """
    return ((predicted - data.following) / scale).square().mean(-1) * data.mask


def _choose(present: Tensor, probability: Tensor, generator: torch.Generator) -> Tensor:
    """Choose gates, and return 1 / the probability of those chosen, `[L, B, n, n]`, 0 elsewhere.

    Args:
        present: Which gates can be open, boolean `[L, B, n, n]`.
        probability: P(A = 1), `[L, B, n, n]`.
        generator: Chooses.
    """
    layers = len(probability)
    spread = (probability * (1 - probability)).sqrt() * present
    of_each = _draw_one(spread, present, generator)
    if layers == 1:
        return of_each
    readers = present.any(-1)
    of_one = of_each * _draw_one(spread.sum(-1), readers, generator).unsqueeze(-1)
    shape = (1, present.shape[1], 1, 1)
    drawn = torch.rand(shape, generator=generator, device=present.device) * 2 * (layers - 1)
    number = torch.arange(layers, device=present.device).view(-1, 1, 1, 1)
    # Above layers - 1, in half of all states, it is the last layer.
    last = number == layers - 1
    early = 2 * (layers - 1) * of_one * (drawn.long() == number)
    return torch.where(last, 2 * of_each * (drawn >= layers - 1), early)


def _draw_one(spread: Tensor, present: Tensor, generator: torch.Generator) -> Tensor:
    """Return 1 / the probability of the one chosen along the last dimension, 0 elsewhere.

    One is drawn with a probability of which half is the same for all that are present, and half
    proportional to `spread`.
    """
    even = present / present.sum(-1, keepdim=True).clamp(min=1)
    total = spread.sum(-1, keepdim=True)
    chance = torch.where(total > 0, (even + spread / total.clamp(min=1e-30)) / 2, even)
    # The first of several alarms that ring at these rates.
    alarm = torch.empty_like(chance).exponential_(generator=generator) / chance
    first = one_hot(alarm.argmin(-1), chance.shape[-1]).bool() & present
    return torch.where(first, 1 / chance, 0.0)
