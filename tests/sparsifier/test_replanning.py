"""A run changes its plan: more steps, another budget, an end by an earlier checkpoint."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from spartan import Budget, Sparsifier
from spartan.always_sparse import SparseLinear
from spartan.errors import BudgetError, MethodError, ScheduleError, StateError
from spartan.methods import DPF, SET, ConstrainedL0, Magnitude, Spartan
from tests.conftest import Net, batch, train_step

PRUNABLE = 288 + 2048 + 128


def started(method: object, steps: int, done: int, density: float = 0.2) -> tuple[Net, Sparsifier]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier = Sparsifier(model, optimizer, method, density, steps)  # type: ignore[arg-type]
    for step in range(done):
        train_step(model, optimizer, step)
    sparsifier.optimizer = optimizer  # type: ignore[attr-defined]
    return model, sparsifier


def train(model: Net, sparsifier: Sparsifier, steps: range) -> None:
    for step in steps:
        train_step(model, sparsifier.optimizer, step)  # type: ignore[attr-defined]


def kept(model: Net) -> int:
    return sum(
        int(w.count_nonzero()) for w in (model.conv.weight, model.fc1.weight, model.fc2.weight)
    )


@pytest.mark.parametrize("method", [Spartan(warmup=0.4), Magnitude()])
def test_an_extended_run_goes_on_as_one_of_that_length(method: object) -> None:
    # Until step 4 no mask of the one or the other has moved by what the length says.
    long, whole = started(method, 40, 0)
    short, sparsifier = started(method, 20, 0)
    sparsifier.extend(40)
    assert sparsifier.total_steps == 40
    train(long, whole, range(40))
    train(short, sparsifier, range(40))
    for one, other in zip(long.parameters(), short.parameters(), strict=True):
        assert torch.equal(one, other)
    sparsifier.finalize()
    assert kept(short) == round(0.2 * PRUNABLE)


def test_extended_in_the_middle_it_is_exact_at_the_end_and_saves_its_length() -> None:
    model, sparsifier = started(Spartan(), 20, 8)
    sparsifier.extend(total_steps=30)
    train(model, sparsifier, range(8, 12))
    again, resumed = started(Spartan(), 30, 0)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(sparsifier.state_dict()))
    train(model, sparsifier, range(12, 30))
    sparsifier.finalize()
    assert (sparsifier.step, kept(model)) == (30, round(0.2 * PRUNABLE))


@pytest.mark.parametrize("method", [DPF(period=4), Magnitude(begin=0.4)])
def test_methods_that_move_now_and_then_can_be_extended(method: object) -> None:
    model, sparsifier = started(method, 20, 5)
    sparsifier.extend(30)
    train(model, sparsifier, range(5, 30))
    sparsifier.finalize()
    assert kept(model) == round(0.2 * PRUNABLE)


def test_another_density_changes_nothing_else() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    budget = Budget(density=0.5, count="all", layer_floor=0.0)
    sparsifier = Sparsifier(model, optimizer, Magnitude(), budget, 20)
    before = sparsifier.budgets()
    sparsifier.retarget(0.5)
    assert sparsifier.budgets() == before
    sparsifier.retarget(0.4)
    assert sparsifier.budget == Budget(density=0.4, count="all", layer_floor=0.0)


def test_weights_without_a_gradient_compete_for_another_budget() -> None:
    model, sparsifier = started(Magnitude(end=0.2), 40, 10, density=0.5)
    model.fc1.weight.requires_grad_(False)
    sparsifier.retarget(0.2)
    train(model, sparsifier, range(10, 12))
    assert sparsifier.at_budget
    assert kept(model) == round(0.2 * PRUNABLE)
    assert all(row.kept for row in sparsifier.layers())


def test_what_cannot_be_extended_is_refused() -> None:
    _, sparsifier = started(Spartan(), 20, 8)
    for wrong in (8, 3, 0, 2.5):
        with pytest.raises(ScheduleError, match="total_steps"):
            sparsifier.extend(wrong)  # type: ignore[arg-type]
    _, fixed = started(Spartan(), 20, 17)
    with pytest.raises(StateError, match="More steps train what is kept"):
        fixed.extend(40)
    assert (sparsifier.total_steps, fixed.total_steps) == (20, 20)


@pytest.mark.parametrize("method", [Spartan(), Magnitude(), ConstrainedL0(gate_lr=3.0)])
@pytest.mark.parametrize("density", [0.1, 0.35])
@pytest.mark.filterwarnings("ignore:The gates of .* reached an expected density")
def test_another_budget_is_met_exactly(method: object, density: float) -> None:
    model, sparsifier = started(method, 20, 10)
    sparsifier.retarget(Budget(density=density))
    train(model, sparsifier, range(10, 20))
    sparsifier.finalize()
    assert kept(model) == round(density * PRUNABLE)
    assert sparsifier.budget == Budget(density=density)


def test_budgets_that_cannot_follow_are_refused() -> None:
    model, sparsifier = started(Spartan(), 20, 10)
    for budget, error in (
        (Budget(density=0.1, allocation="uniform"), StateError),
        (Budget(allocation={"nothing": 0.1}), BudgetError),
    ):
        with pytest.raises(error):
            sparsifier.retarget(budget)
    train(model, sparsifier, range(10, 20))
    with pytest.raises(StateError, match="masks are fixed"):
        sparsifier.retarget(0.1)
    sparsifier.finalize()
    assert kept(model) == round(0.2 * PRUNABLE)
    growing = Sparsifier(SparseLinear(8, 8, density=0.5), None, SET(), 0.5, 10)
    with pytest.raises(StateError, match="convert a model"):
        growing.retarget(0.25)


def test_an_earlier_checkpoint_at_the_budget_ends_the_run_as_it_is() -> None:
    model, sparsifier = started(Spartan(), 20, 11)
    assert sparsifier.at_budget
    best = copy.deepcopy(model.state_dict())
    train(model, sparsifier, range(11, 20))
    model.load_state_dict(best)
    with pytest.raises(StateError, match="written outside"):
        sparsifier.finalize()
    sparsifier.finalize(keep="model")
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    assert kept(model) == round(0.2 * PRUNABLE)
    sparsifier.finalize()  # and a second call agrees


def test_one_of_before_the_budget_is_pruned_by_the_masks() -> None:
    model, sparsifier = started(Spartan(), 20, 3)
    assert not sparsifier.at_budget
    early = copy.deepcopy(model.state_dict())
    train(model, sparsifier, range(3, 20))
    model.load_state_dict(early)
    sparsifier.finalize(keep="model")
    assert 0 < kept(model) <= round(0.2 * PRUNABLE)


class Inside(nn.Module):
    """As a trainer's module, of which other methods than its call are used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.net(x)
        return found


def test_gates_are_drawn_for_passes_that_go_past_the_models_own_call() -> None:
    finals = []
    for told in (True, False):
        module = Inside()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        sparsifier = Sparsifier(module, optimizer, ConstrainedL0(gate_lr=3.0), 0.3, 10)
        for step in range(7):
            if told:
                sparsifier.begin_pass(training=True)
            train_step(module.net if told else module, optimizer, step)
        sparsifier.begin_pass(training=False)
        finals.append([parameter.detach().clone() for parameter in module.parameters()])
    assert all(map(torch.equal, *finals))
    module = Inside()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    Sparsifier(module, optimizer, ConstrainedL0(), 0.3, 10)
    with pytest.raises(MethodError, match="begin_pass"):
        train_step(module.net, optimizer, 0)


def test_gates_are_drawn_in_closures_that_call_parts_of_the_model() -> None:
    finals = []
    for part in (True, False):
        module = Inside()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        sparsifier = Sparsifier(module, optimizer, ConstrainedL0(gate_lr=3.0), 0.3, 10)

        def closure(step: int, called: nn.Module, optimizer: torch.optim.Optimizer) -> float:
            x, y = batch(step)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(called(x), y)
            loss.backward()
            return float(loss)

        for step in range(7):
            called = module.net if part else module
            optimizer.step(partial(closure, step, called, optimizer))
        sparsifier.begin_pass(training=False)
        finals.append([parameter.detach().clone() for parameter in module.parameters()])
    assert all(map(torch.equal, *finals))
