"""What counts as one training step: optimizers within optimizers, in turns, in backward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import spartan
from spartan import Sparsifier
from spartan.errors import StateError
from spartan.methods import Magnitude, Spartan
from tests.conftest import Net, batch, train_step

STEPS = 12
KEPT = round(0.2 * (288 + 2048 + 128))


def kept(model: Net) -> int:
    return sum(
        int(w.count_nonzero()) for w in (model.conv.weight, model.fc1.weight, model.fc2.weight)
    )


def backward(model: nn.Module, step: int) -> None:
    x, y = batch(step)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()


def two_optimizers(model: Net) -> list[torch.optim.Optimizer]:
    rest = [*model.fc1.parameters(), *model.fc2.parameters()]
    return [torch.optim.SGD(part, lr=0.05) for part in (model.conv.parameters(), rest)]


class Derived(torch.optim.SGD):
    """Its step calls that of its base, which has hooks of its own once an SGD was made."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        if self.fails:
            raise RuntimeError("out of memory")


def test_a_step_that_calls_its_base_counts_once() -> None:
    finals = []
    for kind in (torch.optim.SGD, Derived):
        torch.manual_seed(0)
        model = Net()
        optimizer = kind(model.parameters(), lr=0.05, momentum=0.9)
        sparsifier = Sparsifier(model, optimizer, Spartan(), 0.2, STEPS)
        for step in range(STEPS):
            train_step(model, optimizer, step)
        sparsifier.finalize()
        assert sparsifier.step == STEPS
        finals.append(model.state_dict())
    assert all(torch.equal(finals[0][k], finals[1][k]) for k in finals[0])


def test_a_step_that_breaks_off_is_healed_and_not_counted() -> None:
    model = Net()
    optimizer = Derived(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, Magnitude(), 0.2, STEPS)
    for step in range(9):
        train_step(model, optimizer, step)
    w = model.fc1.weight.detach().clone()
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        train_step(model, optimizer, 9)
    assert torch.equal(model.state_dict()["fc1.weight"], w)  # asking heals
    optimizer.fails = False
    for step in range(9, STEPS):
        train_step(model, optimizer, step)
    assert sparsifier.step == STEPS
    sparsifier.finalize()
    assert kept(model) == KEPT


def test_steps_that_one_optimizer_skips_are_told() -> None:
    model = Net()
    first, second = two_optimizers(model)
    sparsifier = Sparsifier(model, None, Magnitude(), 0.2, STEPS)
    for step in range(2):
        backward(model, step)
        first.step()
        second.step()
    assert sparsifier.step == 2
    backward(model, 2)
    first.step()
    backward(model, 3)
    with pytest.warns(UserWarning, match="After step 2 'conv.weight' is stepped again before"):
        first.step()
    second.step()
    assert sparsifier.step == 3


def test_optimizers_that_take_turns_are_refused_before_they_are_mixed_up() -> None:
    model = Net()
    first, second = two_optimizers(model)
    Sparsifier(model, None, Magnitude(), 0.2, STEPS)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    first.step()
    model.zero_grad()
    model.fc1.weight.grad = torch.ones_like(model.fc1.weight)
    before = model.fc1.weight.detach().clone()
    with pytest.raises(StateError, match="'fc1.weight' is stepped apart"):
        second.step()
    assert torch.equal(before, model.fc1.weight)


def test_frozen_zeros_hold_under_an_optimizer_for_each_weight_in_backward() -> None:
    model = Net()
    with torch.no_grad():
        model.fc1.weight[:, ::2] = 0
    frozen = spartan.freeze(model)
    each = {p: torch.optim.Adam([p], lr=0.01) for p in model.parameters()}

    def step_at_once(p: nn.Parameter) -> None:
        each[p].step()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_at_once)
    before = model.fc1.weight.detach().clone()
    for step in range(3):
        backward(model, step)
    frozen.finalize()
    assert int(model.fc1.weight.count_nonzero()) == 1024
    assert not torch.equal(before, model.fc1.weight)


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_a_warm_up_from_zero_counts_and_a_hidden_step_does_not(rate: Any) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    sparsifier = Sparsifier(model, optimizer, Magnitude(), 0.2, STEPS)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = model.state_dict()
    optimizer.step()
    assert sparsifier.step == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    train_step(model, optimizer, 0)  # with gradients, at the learning rate 0
    assert sparsifier.step == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_compiled_step_counts() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier = Sparsifier(model, optimizer, Magnitude(), 0.2, STEPS)
    optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
    for step in range(STEPS):
        train_step(model, optimizer, step)
    sparsifier.finalize()
    assert sparsifier.step == STEPS
    assert kept(model) == KEPT


def test_an_optimizer_of_a_second_phase_takes_the_place_of_those_it_covers() -> None:
    model = Net()
    head = torch.optim.SGD(model.fc2.parameters(), lr=0.05)
    body = torch.optim.SGD(model.fc1.parameters(), lr=0.05)
    with pytest.warns(UserWarning, match="No optimizer steps 'conv.weight'"):
        sparsifier = Sparsifier(model, [head, body], Magnitude(), 0.2, STEPS)
    for step in range(4):
        backward(model, step)
        head.step()
        body.step()
    everything = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.warns(UserWarning, match="from step 5 on: it takes its place"):
        train_step(model, everything, 4)
    for step in range(5, STEPS):
        train_step(model, everything, step)
    sparsifier.finalize()
    assert sparsifier.step == STEPS
    assert kept(model) == KEPT


def test_optimizers_that_share_weights_are_refused_where_none_was_given() -> None:
    """A trunk with two heads, whose optimizers both step the trunk, after passes of their own."""
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("trunk", "actor", "critic")})
    optimizers = {
        name: torch.optim.SGD([*model["trunk"].parameters(), *model[name].parameters()], lr=0.1)
        for name in ("actor", "critic")
    }
    Sparsifier(model, None, Magnitude(), 0.2, STEPS)

    def turn(name: str) -> None:
        optimizers[name].zero_grad()
        model[name](model["trunk"](torch.randn(4, 8))).square().sum().backward()
        optimizers[name].step()

    def rounds(count: int) -> None:
        for _ in range(count):
            turn("actor")
            turn("critic")

    with pytest.warns(UserWarning, match="is stepped again before"):
        rounds(2)
    with pytest.raises(StateError, match="it cannot be known when a training step is complete"):
        rounds(5)


def test_a_layer_that_is_frozen_midway_holds_no_step_up() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, None, Magnitude(), 0.2, STEPS)
    for step in range(6):
        train_step(model, optimizer, step)
    model.conv.requires_grad_(False)  # its gradients stay behind
    rest = torch.optim.SGD([*model.fc1.parameters(), *model.fc2.parameters()], lr=0.05)
    for step in range(6, STEPS):
        train_step(model, rest, step)
    assert sparsifier.step == STEPS
    sparsifier.finalize()
    assert kept(model) == KEPT


def test_many_steps_without_the_last_of_a_list_are_told() -> None:
    model = Net()
    first, last = two_optimizers(model)
    sparsifier = Sparsifier(model, [first, last], Magnitude(), 0.2, STEPS)

    def critic_steps(count: int) -> None:
        for step in range(count):
            backward(model, step)
            first.step()

    critic_steps(5)
    last.step()
    with pytest.warns(UserWarning, match="steps without one of the SGD that is last in the list"):
        critic_steps(10)
    assert sparsifier.step == 1


def test_a_step_without_any_gradient_is_none() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, Magnitude(), 0.2, STEPS)
    optimizer.step()  # as some do to silence schedulers
    assert sparsifier.step == 0


def test_a_handle_that_cannot_be_hooked_is_unwrapped_or_refused() -> None:
    class Handle(torch.optim.Optimizer):
        def __init__(self, **own: Any) -> None:
            vars(self).update(own)

        def step(self, closure: Any = None) -> Any:
            return self.base.step(closure)

    model = Net()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = Handle(base=base, param_groups=base.param_groups)
    sparsifier = Sparsifier(model, handle, Magnitude(), 0.2, STEPS)
    backward(model, 0)
    handle.step()
    assert sparsifier.step == 1
    with pytest.raises(StateError, match="whose steps cannot be hooked"):
        Sparsifier(Net(), Handle(param_groups=[]), Magnitude(), 0.2, STEPS)
