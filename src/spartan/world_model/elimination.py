r"""Backward elimination of open attention gates, state by state.

    worth of a gate  =  error of the state with the gate closed  -  error with it open
    while the gate that is worth least is worth less than a price: close it

The error is that against what came. One gate is closed at a time, so that one of two that stand in
for each other is kept. What is left says of every gate of a state whether it is needed, however
surely the model opens it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spartan.errors import WorldError
from spartan.world_model.model import WorldModel
from spartan.world_model.toggling import squared_errors
from spartan.world_model.transitions import Transitions

# States at a time, and how many of them with other gates: memory only, results do not depend on it.
_STATES, _ROWS = 1000, 4096


@torch.no_grad()
def eliminate(model: WorldModel, data: Transitions, price: float) -> tuple[Tensor, Tensor]:
    """Close the gates between tokens that are worth less than a price, the least worthy first.

    Gates of tokens to themselves stay as they are.

    Args:
        model: Of mode `"sparse"`; its gates as they are when not training.
        data: M states and what came.
        price: In units of a state's error: squared, in units of σ, in the mean over features that
            change, summed over objects.

    Returns:
        A of the gates that are left, 0 or 1, and what closing each of them would cost, ∞ where a
        gate is closed; both `[L, M, N + 1, N + 1]`.

    Raises:
        WorldError: The model has no gates of its own, or the price is not positive.
    """
    if model.config.mode != "sparse":
        raise WorldError(f"mode={model.config.mode!r} has no gates of its own to close.")
    if not price > 0:
        raise WorldError(f"price={price} must be positive.")
    model.eval()
    parts = [
        _eliminate(model, data[begin : begin + _STATES], price)
        for begin in range(0, len(data), _STATES)
    ]
    left, worth = zip(*parts, strict=True)
    return torch.cat(left, 1), torch.cat(worth, 1)


def _eliminate(model: WorldModel, data: Transitions, price: float) -> tuple[Tensor, Tensor]:
    # [M, L, n, n]: the gates of a state side by side.
    left = model(data.states, data.environment, data.mask).adjacency.transpose(0, 1).contiguous()
    between = ~torch.eye(left.shape[-1], dtype=torch.bool, device=left.device)
    worth = torch.full_like(left, math.inf)
    changed = torch.arange(len(data), device=left.device)
    while len(changed):
        worth[changed] = _worths(model, data[changed], left[changed], between)
        least, gate = worth[changed].flatten(1).min(1)
        closes = least < price
        changed, gate = changed[closes], gate[closes]
        left.view(len(left), -1)[changed, gate] = 0
    own = _worths(model, data, left, ~between)
    return left.transpose(0, 1), torch.where(between, worth, own).transpose(0, 1)


def _worths(model: WorldModel, data: Transitions, left: Tensor, asked: Tensor) -> Tensor:
    """Return what each open gate is worth of those asked for, ∞ elsewhere, `[M, L, n, n]`."""
    state, *gate = ((left > 0) & asked).nonzero(as_tuple=True)
    closed = left.new_empty(len(state))
    for begin in range(0, len(state), _ROWS):
        rows = slice(begin, begin + _ROWS)
        given = left[state[rows]]
        given[torch.arange(len(given), device=left.device), *(index[rows] for index in gate)] = 0
        closed[rows] = _errors(model, data[state[rows]], given)
    worth = torch.full_like(left, math.inf)
    worth[state, *gate] = closed - _errors(model, data, left)[state]
    return worth


def _errors(model: WorldModel, data: Transitions, gates: Tensor) -> Tensor:
    """Return the error of each state under given gates, `[M]`."""
    adjacency = gates.transpose(0, 1)
    predicted = model(data.states, data.environment, data.mask, adjacency=adjacency).states
    return squared_errors(predicted, data, model.scale).sum(-1)
