r"""Which open gates a state can do without: backward elimination, state by state.

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

from spartan.world_model.model import WorldModel
from spartan.world_model.toggling import squared_errors
from spartan.world_model.transitions import Transitions

_STATES, _ROWS = 1000, 4096  # at a time, and how many of them with other gates


@torch.no_grad()
def eliminate(model: WorldModel, data: Transitions, price: float) -> tuple[Tensor, Tensor]:
    """Close the gates between tokens that are worth less than a price, the least worthy first.

    Gates of tokens to themselves stay as they are.

    Args:
        model: Whose gates, as they are when not training.
        data: M states and what came.
        price: In units of a state's error: squared, in units of σ, in the mean over features that
            change, summed over objects.

    Returns:
        A of the gates that are left, 0 or 1, and what closing each of them would cost, ∞ where a
        gate is closed; both `[L, M, N + 1, N + 1]`.
    """
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
    toggled = left[state]
    toggled[torch.arange(len(state), device=left.device), *gate] = 0
    worth = torch.full_like(left, math.inf)
    change = _errors(model, data, state, toggled)
    change -= _errors(model, data, torch.arange(len(left), device=left.device), left)[state]
    worth[state, *gate] = change
    return worth


def _errors(model: WorldModel, data: Transitions, state: Tensor, gates: Tensor) -> Tensor:
    """Return the error of some of the states, with their gates given, `[R]`."""
    errors = [data.following.new_zeros(0)]
    for begin in range(0, len(state), _ROWS):
        rows = slice(begin, begin + _ROWS)
        part = data[state[rows]]
        adjacency = gates[rows].transpose(0, 1)
        predicted = model(part.states, part.environment, part.mask, adjacency=adjacency).states
        errors.append(squared_errors(predicted, part, model.scale).sum(-1))
    return torch.cat(errors)
