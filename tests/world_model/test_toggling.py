"""The gradient of gates is that of the expected error."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spartan.world_model import GlobalGraph, Prediction, Transitions, WorldModel
from spartan.world_model.toggling import gate_slopes, squared_errors
from tests.world_model.test_model import CONFIG, N, draw, make

COUNT = 6


def some_data() -> Transitions:
    states, environment = draw()
    mask = torch.ones(COUNT, N, dtype=torch.bool)
    mask[2, 3] = False
    following = torch.randn(COUNT, N, CONFIG.changing, generator=torch.Generator().manual_seed(3))
    return Transitions(states[:COUNT], following, mask, environment[:COUNT])


def toggled_one_by_one(model: WorldModel, data: Transitions, prediction: Prediction) -> Tensor:
    """Return what each gate adds to the mean error by being open, the others as they are."""
    adjacency = prediction.adjacency
    slopes = torch.zeros_like(adjacency)

    def errors(layer: int, i: int, j: int, value: float) -> Tensor:
        given = adjacency.clone()
        given[layer, :, i, j] = value
        said = model(data.states, data.environment, data.mask, adjacency=given).states
        return squared_errors(said, data, model.scale).sum(-1) / data.mask.sum()

    for layer in range(len(adjacency)):
        for i in range(N):
            for j in range(N + 1):
                slopes[layer, :, i, j] = errors(layer, i, j, 1.0) - errors(layer, i, j, 0.0)
    return slopes


COPIES = 500


def slopes_of(
    model: WorldModel | GlobalGraph,
    data: Transitions,
    prediction: Prediction,
    generator: torch.Generator,
    draws: int,
) -> Tensor:
    """Return estimates of the gradient, `[draws, L, B, n, n]`, of copies of the states at once."""
    rows = torch.arange(len(data)).repeat(COPIES)
    fields = {
        field.name: getattr(prediction, field.name) for field in dataclasses.fields(prediction)
    }
    many = Prediction(
        states=fields.pop("states")[rows], **{name: x[:, rows] for name, x in fields.items()}
    )
    found = []
    for _ in range(draws // COPIES):
        # Errors are means over all states: the copies divide each by their number.
        slopes = COPIES * gate_slopes(model, data[rows], many, generator)
        found.append(slopes.unflatten(1, (COPIES, len(data))).transpose(0, 1))
    return torch.cat(found)


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_mean_is_the_gradient_of_every_gate(layers: int) -> None:
    model, data = make(replace(CONFIG, layers=layers)), some_data()
    generator = torch.Generator().manual_seed(0)
    prediction = model(data.states, data.environment, data.mask, generator)
    expected = toggled_one_by_one(model, data, prediction)
    draws = slopes_of(model, data, prediction, generator, 4000)
    wrong = draws.mean(0) - expected
    spread = draws.std(0) / len(draws) ** 0.5
    # Of some hundred gates, none is off by more than chance allows.
    assert bool((wrong.abs() <= 5 * spread + 1e-7).all())
    assert float(expected.abs().mean()) > 3 * float(wrong.abs().mean())


@torch.no_grad()
def test_the_global_graph_has_it_too() -> None:
    torch.manual_seed(0)
    model, data = GlobalGraph(CONFIG, N), some_data()
    model.gate_logits.data = torch.randn(N, N + 1)
    generator = torch.Generator().manual_seed(0)
    prediction = model(data.states, data.environment, data.mask, generator)
    expected = toggled_one_by_one(model, data, prediction)
    draws = slopes_of(model, data, prediction, generator, 4000)
    spread = draws.std(0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - expected).abs() <= 5 * spread + 1e-7).all())


@torch.no_grad()
def test_gates_of_what_is_not_there_are_not_toggled() -> None:
    model, data = make(), some_data()
    generator = torch.Generator().manual_seed(0)
    severed = torch.rand(COUNT, N + 1, N + 1, generator=generator) < 0.3
    prediction = model(data.states, data.environment, data.mask, generator, severed=severed)
    there = torch.cat((data.mask, data.environment.unsqueeze(1) > 0), 1)
    for _ in range(200):
        rows = gate_slopes(model, data, prediction, generator) != 0
        assert not bool((rows & (severed | ~there.unsqueeze(1) | ~there.unsqueeze(2))).any())


def test_a_gate_that_is_needed_opens_and_one_that_is_not_closes() -> None:
    """Straight through, both would have a gradient of 0: the error is at its least."""
    model, data = make(), some_data()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        target = model(data.states, data.environment, data.mask)
    data = replace(data, following=target.states)
    prediction = model(data.states, data.environment, data.mask, generator)
    slopes = slopes_of(model, data, target, generator, 3000).sum(0)
    assert prediction.adjacency.requires_grad
    opened = target.adjacency[-1] > 0
    clear = slopes[-1].abs() > slopes[-1].abs().max() / 1e3
    assert bool((slopes[-1][opened & clear] < 0).all())
    assert bool((slopes[-1][~opened & clear] > 0).all())
