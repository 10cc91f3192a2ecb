"""Backward elimination against trying every gate, and gates that learn from it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spartan.errors import StateError, WorldError
from spartan.files import load_state, save_state
from spartan.world_model import (
    ErrorBudget,
    Learner,
    NearestObjects,
    Recipe,
    Refiner,
    Transitions,
    WorldModel,
    eliminate,
    found_graphs,
    measure,
    score_graphs,
)
from spartan.world_model.refining import label
from spartan.world_model.toggling import squared_errors
from tests.world_model.test_model import N, make
from tests.world_model.test_toggling import some_data
from tests.world_model.worlds import follower_world, make_model, train

COUNT, PRICE = 3, 0.05


def error_of(model: WorldModel, one: Transitions, gates: Tensor) -> float:
    said = model(one.states, one.environment, one.mask, adjacency=gates).states
    return float(squared_errors(said, one, model.scale).sum())


def eliminated_one_by_one(model: WorldModel, one: Transitions, price: float) -> Tensor:
    """Return the gates of one state that are left, `[L, 1, N + 1, N + 1]`."""
    left = model(one.states, one.environment, one.mask).adjacency.clone()
    while True:
        worth = {}
        for layer, _, i, j in left.nonzero().tolist():
            if i != j:
                closed = left.clone()
                closed[layer, 0, i, j] = 0
                worth[layer, i, j] = error_of(model, one, closed) - error_of(model, one, left)
        if not worth or min(worth.values()) >= price:
            return left
        layer, i, j = min(worth, key=lambda gate: worth[gate])
        left[layer, 0, i, j] = 0


@torch.no_grad()
@pytest.mark.parametrize("price", [1e-4, PRICE, 1e9])
def test_the_least_worthy_gate_is_closed_until_all_are_worth_the_price(price: float) -> None:
    model, data = make(), some_data()[:COUNT]
    before = model(data.states, data.environment, data.mask).adjacency
    left, worth = eliminate(model, data, price)
    own = torch.eye(N + 1, dtype=torch.bool)
    assert bool((left <= before).all())
    assert torch.equal(left[..., own], before[..., own])
    assert bool((worth[(left > 0) & ~own] >= price).all())
    assert bool((worth[left == 0] == math.inf).all())
    for k in range(COUNT):
        expected = eliminated_one_by_one(model, data[slice(k, k + 1)], price)
        assert torch.equal(left[:, k], expected[:, 0])
    closed = (before[:, :, ~own] > left[:, :, ~own]).float().mean()
    kept = left[:, :, ~own].mean()
    assert bool(closed > 0)
    assert bool(kept == 0) == (price == 1e9)


@torch.no_grad()
def test_worth_is_what_closing_costs() -> None:
    model, data = make(), some_data()[:COUNT]
    left, worth = eliminate(model, data, PRICE)
    for layer, k, i, j in left.nonzero().tolist():
        closed = left[:, k : k + 1].clone()
        closed[layer, 0, i, j] = 0
        one = data[slice(k, k + 1)]
        cost = error_of(model, one, closed) - error_of(model, one, left[:, k : k + 1])
        assert float(worth[layer, k, i, j]) == pytest.approx(cost, abs=1e-4)


def test_a_needed_gate_weighs_what_it_is_worth_within_limits() -> None:
    left = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    worth = torch.tensor([[0.1, 0.15, 9.0], [0.05, -0.1, math.inf], [0.1, math.inf, math.inf]])
    expected = torch.tensor([[-2.0, -2.0, -8.0], [0.0, 2.0, 1.0], [-1.0, 1.0, 0.0]])
    assert torch.allclose(label(left, worth, 0.05), expected)


def test_the_loss_does_not_fade_where_a_gate_is_surely_wrong() -> None:
    model, data = make(), some_data()[:COUNT]
    recipe = Recipe(steps=5, batch_size=COUNT)
    refiner = Refiner(model, data, data, recipe, ErrorBudget(1.0), PRICE)
    rows = torch.arange(COUNT)
    prediction = refiner.model(refiner.data.states, refiner.data.environment, refiner.data.mask)
    wrong = refiner.labels.sign() * prediction.present
    sure = (100 * wrong).requires_grad_()
    loss = refiner.gate_loss(rows, refiner.data, replace(prediction, logits=sure))
    (slopes,) = torch.autograd.grad(loss, sure)
    expected = refiner.labels * prediction.present / data.mask.sum()
    assert torch.allclose(slopes, expected, atol=1e-6)
    right = (-100 * wrong).requires_grad_()
    loss = refiner.gate_loss(rows, refiner.data, replace(prediction, logits=right))
    (slopes,) = torch.autograd.grad(loss, right)
    assert float(slopes.abs().max()) < 1e-6


@pytest.fixture(scope="module")
def world() -> tuple[Transitions, Transitions]:
    return follower_world(6_000), follower_world(1_000, seed=1)


@pytest.fixture(scope="module")
def begun(world: tuple[Transitions, Transitions]) -> WorldModel:
    """A model whose gates are far from settled: many are open that no state needs."""
    dense = train(Learner(make_model(world[0], mode="dense"), *world, Recipe(steps=500, lr=3e-3)))
    model = make_model(world[0])
    model.load_state_dict(dense.state_dict())
    return train(Learner(model, *world, Recipe(steps=300, lr=1.5e-3), ErrorBudget(0.1)))


def again(model: WorldModel) -> WorldModel:
    copied = make_model(follower_world(8))
    copied.load_state_dict(model.state_dict())
    return copied


def test_gates_learn_what_is_needed(
    begun: WorldModel, world: tuple[Transitions, Transitions]
) -> None:
    before = score_graphs(found_graphs(begun, world[1]), world[1])
    refiner = Refiner(again(begun), *world, Recipe(steps=500, lr=1.5e-3), ErrorBudget(0.1))
    model = train(refiner)
    after = score_graphs(found_graphs(model, world[1]), world[1])
    assert 3 * after.shd < before.shd
    assert after.recall > 0.9
    assert measure(model, world[1])[0] <= 0.1


def test_what_was_within_the_budget_stays_within(
    begun: WorldModel, world: tuple[Transitions, Transitions]
) -> None:
    error, edges = measure(begun, world[1])
    recipe = Recipe(steps=20, lr=50.0, checks=20)  # far too large
    refiner = Refiner(again(begun), *world, recipe, ErrorBudget(1.0001 * error))
    with pytest.warns(UserWarning, match="as it was"):
        model = train(refiner)
    assert measure(model, world[1]) == (error, edges)


def test_resuming_is_exact(
    begun: WorldModel,
    world: tuple[Transitions, Transitions],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    recipe, budget = Recipe(steps=40, checks=4), ErrorBudget(0.1)
    whole = Refiner(again(begun), *world, recipe, budget)
    half = Refiner(again(begun), *world, recipe, budget)
    for _ in range(15):
        half.advance()
        if half.checks_now:
            half.check()
    path = tmp_path_factory.mktemp("run") / "state.safetensors"
    save_state(path, half.state_dict())
    rest = Refiner(again(begun), *world, recipe, budget)
    rest.load_state_dict(load_state(path))
    expected, found = train(whole).state_dict(), train(rest).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)

    other = Refiner(make_model(world[0]), world[1][:50], world[1], recipe, budget)
    with pytest.raises(StateError, match="another model"):
        other.load_state_dict(load_state(path))
    assert other.step == 0


def test_what_it_cannot_refine_is_refused(world: tuple[Transitions, Transitions]) -> None:
    data = world[1]
    with pytest.raises(WorldError, match="price"):
        Refiner(make_model(data), data, data, Recipe(steps=5), ErrorBudget(0.1), price=0.0)
    dense = make_model(data, mode="dense")
    with pytest.raises(WorldError, match="no gates"):
        Refiner(dense, data, data, Recipe(steps=5), ErrorBudget(0.1))
    nearest = NearestObjects(dense.config)
    with pytest.raises(WorldError, match="no gates of its own"):
        eliminate(nearest, data, PRICE)
    with pytest.raises(WorldError, match="price=nan"):
        eliminate(make_model(data), data, math.nan)


def test_gates_that_are_mostly_open_are_not_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    data = follower_world(1000)
    model = make_model(data)
    model.gate_shift.fill_(100.0)
    monkeypatch.setattr("spartan.world_model.refining._PREDICTIONS", 2000)
    with pytest.raises(WorldError, match="gates between tokens are open"):
        Refiner(model, data, data, Recipe(steps=5), ErrorBudget(0.1))
    Refiner(model, data[:50], data, Recipe(steps=5), ErrorBudget(0.1))
