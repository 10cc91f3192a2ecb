"""What every growth method must keep. A new one joins by adding one row to METHODS."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spartan
from spartan import Budget, Sparsifier
from spartan.always_sparse import SparseLinear, convert, sparse_layers, to_dense
from spartan.errors import (
    NonFiniteError,
    StateError,
)
from spartan.kernels.key_lists import is_in, merge
from spartan.methods import DSTEE, GSE, SET, RigL, Static
from spartan.methods.growth.contract import GrowthMethod, largest
from spartan.sparsifier.growing_run import GrowingRun
from tests.conftest import Net, batch, train_step

METHODS: list[GrowthMethod] = [
    GSE(period=3),
    GSE(period=2, sampler="grabo", gamma=0.5),
    GSE(period=2, sampler="graest", gamma=2.0),
    SET(period=3),
    RigL(period=3),
    DSTEE(period=3),
    Static(),
]
STEPS, DENSITY = 20, 0.2
ALLOCATIONS = ["global", "er", "uniform"]

pytestmark = pytest.mark.filterwarnings("ignore:.*have no connection")
method_param = pytest.mark.parametrize("method", METHODS, ids=repr)
moving_param = pytest.mark.parametrize("method", METHODS[:-1], ids=repr)


def sparse_net(allocation: str = "global", seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return convert(Net(), DENSITY, "er" if allocation == "global" else allocation)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)


def sparsify(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    method: GrowthMethod,
    allocation: str = "global",
    steps: int = STEPS,
) -> Sparsifier:
    budget = Budget(density=DENSITY, allocation=allocation)
    return Sparsifier(model, optimizer, method, budget, steps)


@method_param
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_exact_at_every_step(method: GrowthMethod, allocation: str) -> None:
    model = sparse_net(allocation)
    optimizer = sgd(model)
    sparsifier = sparsify(model, optimizer, method, allocation)
    assert isinstance(sparsifier.run, GrowingRun)
    total = sum(weight.prunable.numel for weight in sparsifier.weights)
    budget = sum(share.kept for _, share in sparsifier.budgets())
    assert abs(budget - DENSITY * total) <= 1.5
    first = {weight.name: weight.connections.count for weight in sparsifier.weights}
    parameters = dict(model.named_parameters())
    moved = 0
    for step in range(STEPS):
        before = sparsifier.selected()
        train_step(model, optimizer, step)
        now = {weight.name: weight.connections.count for weight in sparsifier.weights}
        assert sum(now.values()) == budget
        if allocation != "global":
            assert now == first
        if sparsifier.moves_after(step + 1):
            moved += sparsifier.churn(before) > 0
        else:
            assert sparsifier.churn(before) == 0
        for weight in sparsifier.weights:
            assert weight.prunable.parameter.shape == (weight.connections.count,)
            assert bool(is_in(weight.connections.keys(), weight.tried).all())
    assert moved >= 4 or isinstance(method, Static)
    assert {k: id(p) for k, p in model.named_parameters()} == {
        k: id(p) for k, p in parameters.items()
    }
    assert sparsifier.density == budget / total
    assert sum(row.kept for row in sparsifier.layers()) == budget
    assert sparsifier.monitor()["tried"] >= sparsifier.density
    sparsifier.finalize()
    assert not optimizer._optimizer_step_pre_hooks
    assert sum(int(m.weight.count_nonzero()) for m in weighted(to_dense(model))) <= budget


def weighted(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


@method_param
@pytest.mark.parametrize("allocation", ["global", "er"])
def test_resume_is_bit_equal(method: GrowthMethod, allocation: str) -> None:
    """A run that is stopped before each of five steps, and goes on in a fresh model each time."""

    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Sparsifier]:
        model = sparse_net(allocation, seed)
        optimizer = sgd(model)
        return model, optimizer, sparsify(model, optimizer, method, allocation)

    whole = start(0)
    losses = [train_step(whole[0], whole[1], step) for step in range(STEPS)]
    parts, again = start(0), []
    for step in range(STEPS):
        if step in (0, 2, 3, 7, 12):
            states = copy.deepcopy([part.state_dict() for part in parts])
            parts = start(90 + step)
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
        again.append(train_step(parts[0], parts[1], step))
    assert again == losses
    assert parts[2].monitor() == whole[2].monitor()
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, parts[0].state_dict()[name])


def test_every_method_has_a_row() -> None:
    growing = {m for m in spartan.methods.METHODS.values() if issubclass(m, GrowthMethod)}
    assert {type(m) for m in METHODS} == growing


# One update --------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
}


@moving_param
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("given", [True, False])
def test_state_follows_its_connection(method: GrowthMethod, kind: str, given: bool) -> None:
    model = sparse_net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    sparsifier = sparsify(model, optimizer if given else None, method)
    for step in range(method.period - 1):
        train_step(model, optimizer, step)

    # The same step without an update.
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    twin_optimizer._optimizer_step_post_hooks.clear()
    before = sparsifier.selected()
    train_step(model, optimizer, 7)
    sparsifier.finalize()
    names = {id(p): n for n, p in model.named_parameters()}
    twins = dict(twin.named_parameters())
    train_step(twin, twin_optimizer, 7)
    grown = 0
    for weight in sparsifier.weights:
        values, old = weight.prunable.parameter, twins[names[id(weight.prunable.parameter)]]
        keys, old_keys = weight.connections.keys(), before[weight.name]
        new = ~is_in(keys, old_keys)
        places = torch.searchsorted(old_keys, keys[~new])
        grown += int(new.sum())
        pairs = [(values.detach(), old.detach()), (values.grad, old.grad)]
        for key, entries in optimizer.state[values].items():
            was = twin_optimizer.state[old][key]
            if entries.dim() == 0:
                assert torch.equal(entries, was)
            else:
                pairs.append((entries, was))
        for now, was in pairs:
            assert now.shape == values.shape
            assert torch.equal(now[~new], was[places])
            assert not bool(now[new].any())
    assert grown > 0


@moving_param
def test_what_is_pruned_is_smallest_and_what_is_grown_was_not_there(method: GrowthMethod) -> None:
    model = sparse_net()
    optimizer = sgd(model)
    sparsifier = sparsify(model, optimizer, method)
    for step in range(method.period - 1):
        train_step(model, optimizer, step)
    moves: list[Any] = []
    choose = sparsifier.run._moves
    before_move: dict[str, Tensor] = {}
    kept_least: list[float] = []
    pruned_most: list[float] = []

    def watched(step: int) -> Any:
        before_move.update(
            {s.name: s.prunable.parameter.detach().clone() for s in sparsifier.weights}
        )
        moves.extend(choose(step))
        return iter(moves)

    sparsifier.run._moves = watched  # type: ignore[method-assign]
    count = sum(weight.connections.count for weight in sparsifier.weights)
    keys = {weight.name: weight.connections.keys() for weight in sparsifier.weights}
    train_step(model, optimizer, 5)
    assert [move.layer for move in moves] == sparsifier.weights
    grown = sum(move.grown.numel() for move in moves)
    pruned = sum(int((~move.kept).sum()) for move in moves)
    wanted = math.ceil(method.fraction_at(method.period, STEPS) * count)
    assert 0 < grown == pruned <= wanted
    if not isinstance(method, GSE):
        assert grown == wanted
    for move in moves:
        values = before_move[move.layer.name].abs()
        kept_least.append(float(values[move.kept].min()))
        pruned_most.append(float(values[~move.kept].max()) if not bool(move.kept.all()) else 0.0)
        assert not bool(is_in(move.grown, keys[move.layer.name]).any())
        assert move.grown.tolist() == sorted(set(move.grown.tolist()))
    assert max(pruned_most) <= min(kept_least)  # one threshold for all layers


def test_growth_alone_changes_nothing_and_pruning_takes_the_smallest() -> None:
    layer = SparseLinear(20, 20, density=0.2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    sparsifier = Sparsifier(layer, optimizer, GSE(period=1, end=1.0), Budget(density=0.2), 10)
    x = torch.randn(8, 20)
    before = layer.to_dense().weight.detach()
    layer(x).square().sum().backward()
    optimizer.step()
    after = layer.to_dense().weight.detach()
    changed = before != after
    assert bool((after[changed] == 0).all())
    count = int(changed.sum())
    assert count == math.ceil(0.2 * 80)
    smallest = before[before != 0].abs().sort().values[:count]
    assert torch.equal(before[changed].abs().sort().values, smallest)
    sparsifier.finalize()


@pytest.mark.parametrize("loss_kept", [True, False])
def test_layers_change_their_size_while_a_graph_is_alive(loss_kept: bool) -> None:
    model = sparse_net()
    optimizer = sgd(model)
    sparsifier = sparsify(model, optimizer, SET(period=1, end=1.0), steps=10)
    kept = []
    for step in range(10):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if loss_kept:
            kept.append(loss)
        optimizer.step()
    sizes = [weight.connections.count for weight in sparsifier.weights]
    assert sizes != [layer.values.numel() for layer in sparse_layers(sparse_net()).values()]


# Schedule and state ------------------------------------------------------------------------------


def test_cosine_and_number_of_updates() -> None:
    method = GSE(fraction=0.2, period=10, end=0.5)
    total, end = 400, 200
    steps = [s for s in range(1, total + 1) if method.fraction_at(s, total) > 0]
    assert len(steps) == (end + 1) // 10
    assert steps[0] == 10
    every = GSE(fraction=0.2, period=1, end=0.5)
    assert every.fraction_at(1, total) == 0.2
    assert every.fraction_at(end // 2 + 1, total) == pytest.approx(0.1)
    assert every.fraction_at(end + 1, total) == 0
    assert every.fraction_at(0, total) == 0


def test_skipped_steps_forget_their_passes() -> None:
    model = sparse_net()
    # Without momentum: torch does not initialise its buffers in a first step that is skipped.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    sparsifier = sparsify(model, optimizer, RigL(period=1, end=1.0))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.grad_scale = torch.tensor(1.0)
    before = sparsifier.selected()
    train_step(model, optimizer, 0)
    assert sparsifier.churn(before) == 0
    assert sparsifier.step == 0
    assert not sparsifier.weights[0].passes
    del optimizer.found_inf, optimizer.grad_scale
    train_step(model, optimizer, 0)
    assert sparsifier.step == 1


def test_passes_are_kept_for_updates_only_and_accumulate() -> None:
    model = sparse_net()
    optimizer = sgd(model)
    sparsifier = sparsify(model, optimizer, RigL(period=2, end=1.0))
    weight = sparsifier.weights[-1]
    train_step(model, optimizer, 0)
    optimizer.zero_grad()
    for step in (1, 2):
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
    assert len(weight.passes) == 2
    optimizer.step()
    assert not weight.passes
    train_step(model, optimizer, 3)


def test_broken_numbers_change_no_connection() -> None:
    model = sparse_net()
    optimizer = sgd(model)
    sparsifier = sparsify(model, optimizer, RigL(period=1, end=1.0))
    x, y = batch(0)
    before = copy.deepcopy(dict(model.named_parameters()))
    graphs = sparsifier.selected()
    (nn.functional.cross_entropy(model(x), y) * math.nan).backward()
    with pytest.raises(NonFiniteError, match="at step 1"):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    assert sparsifier.churn(graphs) == 0
    assert sparsifier.step == 0


def test_states_that_do_not_fit() -> None:
    model = sparse_net()
    optimizer = sgd(model)
    sparsifier = sparsify(model, optimizer, GSE(period=1))
    state = copy.deepcopy(sparsifier.state_dict())
    with pytest.raises(StateError, match="was saved with method"):
        sparsify(sparse_net(), None, GSE(period=2)).load_state_dict(state)
    other = sparse_net(seed=5)
    with pytest.raises(StateError, match="model's state dict first"):
        sparsify(other, sgd(other), GSE(period=1)).load_state_dict(state)
    with pytest.raises(StateError, match="another model"):
        sparsifier.load_state_dict({**state, "weights": {}})
    with pytest.raises(StateError, match="another version"):
        sparsifier.load_state_dict({"version": 0})
    for step in range(STEPS):
        train_step(model, optimizer, step)
    graphs = sparsifier.selected()
    with pytest.warns(UserWarning, match="the masks stay"):
        train_step(model, optimizer, 0)
    assert sparsifier.churn(graphs) == 0
    sparsifier.finalize()
    with pytest.raises(StateError, match="the run is over"):
        sparsifier.state_dict()


def test_more_than_there_is_to_grow() -> None:
    torch.manual_seed(0)
    layer = SparseLinear(10, 10, density=0.97)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for method in (GSE, SET, RigL, DSTEE):
        sparsifier = Sparsifier(
            layer, optimizer, method(period=1, fraction=1.0), Budget(density=0.97), 3
        )
        before = sparsifier.selected()
        optimizer.zero_grad()
        layer(torch.randn(4, 10)).square().sum().backward()
        optimizer.step()
        assert layer.values.numel() == 97
        assert sparsifier.churn(before) == 3 / 97
        sparsifier.finalize()
    full = SparseLinear(5, 5, density=1)
    optimizer = torch.optim.SGD(full.parameters(), 0.1)
    Sparsifier(full, optimizer, RigL(period=1), Budget(density=1), 3)
    full(torch.randn(2, 5)).sum().backward()
    optimizer.step()


def test_lists() -> None:
    merged, places = merge(torch.tensor([1, 4, 9]), torch.tensor([0, 5, 10]))
    assert merged.tolist() == [0, 1, 4, 5, 9, 10]
    assert places.tolist() == [1, 2, 4]
    masks = largest([torch.tensor([1.0, 3.0, 2.0]), torch.tensor([]), torch.tensor([2.0])], 2)
    assert [m.tolist() for m in masks] == [[False, True, True], [], [False]]
