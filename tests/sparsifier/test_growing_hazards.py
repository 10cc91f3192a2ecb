"""Where connections move: gradients of other passes, optimizers' states, copies, loaded weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from spartan import Budget, Sparsifier
from spartan.always_sparse import SparseLinear, to_dense
from spartan.errors import MethodError, StateError
from spartan.methods import DSTEE, SET, RigL

STEPS = 20


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        SparseLinear(20, 20, density=0.2), nn.Tanh(), SparseLinear(20, 20, density=0.2)
    )


def attach(model: nn.Module, optimizer: Any, method: Any = None) -> Sparsifier:
    method = method or RigL(period=1, fraction=0.3, end=1.0)
    return Sparsifier(model, optimizer, method, Budget(density=0.2, allocation="uniform"), STEPS)


def backward(model: nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(16, 20, generator=generator) for _ in range(2))
    (model(x) - y).square().mean().mul(scale).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


# Which gradient decides what grows ----------------------------------------------------------------


def gradient_of_an_input(model: nn.Module) -> None:
    z = (100 * torch.randn(16, 20)).requires_grad_()
    torch.autograd.grad(model(z).square().sum(), z)


def gradient_of_an_input_by_backward(model: nn.Module) -> None:
    z = (100 * torch.randn(16, 20)).requires_grad_()
    model(z).square().sum().backward(inputs=[z])


def pass_while_frozen(model: nn.Module) -> None:
    model.requires_grad_(False)
    model((100 * torch.randn(16, 20)).requires_grad_()).square().sum().backward()
    model.requires_grad_(True)


def norm_that_is_logged(model: nn.Module) -> None:
    loss = model(100 * torch.randn(16, 20)).square().sum()
    torch.autograd.grad(loss, [*model.parameters()])


def pass_that_was_cleared(model: nn.Module) -> None:
    backward(model, 77, 100.0)
    model.zero_grad(set_to_none=True)


def pass_that_was_zeroed(model: nn.Module) -> None:
    backward(model, 77, 100.0)
    model.zero_grad(set_to_none=False)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        gradient_of_an_input, gradient_of_an_input_by_backward, pass_while_frozen,
        norm_that_is_logged, pass_that_was_cleared, pass_that_was_zeroed,
    ],
)  # fmt: skip
def test_other_passes_do_not_decide_what_grows(
    other: Callable[[nn.Module], None], after: bool
) -> None:
    found = []
    for disturbed in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        sparsifier = attach(model, optimizer)
        clears = other in (pass_that_was_cleared, pass_that_was_zeroed)
        if disturbed and not (after and not clears):
            other(model)
        backward(model)
        if disturbed and after and not clears:
            other(model)
        optimizer.step()
        found.append(sparsifier.selected())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda grads: [g.mul_(3) for g in grads],
        lambda grads: [g.clamp_(-1e-3, 1e-3) for g in grads],
        lambda grads: [g.mul_(0) for g in grads],
    ],
)
def test_scaled_and_clipped_gradients_are_fine(change: Callable[[list[Tensor]], Any]) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = attach(model, optimizer)
    backward(model, 1)
    backward(model, 2)
    change([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    assert sparsifier.step == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.grad.copy_(torch.randn_like(p)),
        lambda p: setattr(p, "grad", torch.randn_like(p)),
        lambda p: p.grad.add_(torch.randn_like(p) * p.grad.std()),
    ],
)
def test_gradients_from_elsewhere_are_refused_before_the_step(
    change: Callable[[nn.Parameter], Any],
) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = attach(model, optimizer)
    backward(model)
    change(model[2].values)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match="'2.values' is not the sum of the backward passes"):
        optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert sparsifier.step == 0


# What optimizers keep -----------------------------------------------------------------------------


class Keeping(torch.optim.Optimizer):
    """Momentum that is kept somewhere."""

    def __init__(self, params: Any, keep: Callable[[Keeping, Tensor], Any]) -> None:
        super().__init__(params, {"lr": 0.1})
        self.keep, self.buffers = keep, {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            self.keep(self, p)
            p.sub_(p.grad, alpha=0.1)


@pytest.mark.parametrize(
    "keep",
    [
        lambda o, p: o.state[p].update(m=torch.zeros(p.numel(), dtype=torch.uint8)),
        lambda o, p: o.state[p].update(m=torch.zeros(p.numel(), 1)),
        lambda o, p: o.state[p].update(m=torch.zeros(7)),
        lambda o, p: o.state[p].update(m=[torch.zeros(7)]),
        lambda o, p: o.buffers.update({id(p): torch.zeros_like(p)}),
        lambda o, p: o.state.update(all=torch.zeros(160)),
    ],
)
def test_states_that_cannot_follow_are_refused(keep: Callable[[Keeping, Tensor], Any]) -> None:
    model = network()
    optimizer = Keeping([layer.values for layer in (model[0], model[2])], keep)
    attach(model, optimizer, SET(period=2, end=1.0))
    with pytest.raises(MethodError, match="cannot follow connections that move"):
        train(model, optimizer, 2)


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam,
        torch.optim.Adamax, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta,
        torch.optim.ASGD, torch.optim.Adafactor, torch.optim.SGD,
    ],
)  # fmt: skip
def test_optimizers_of_torch_go(make: Any) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=0.01)
    sparsifier = attach(model, optimizer)
    train(model, optimizer, 5)
    assert sparsifier.step == 5


def test_lbfgs_is_refused_also_where_it_is_found() -> None:
    model = network()
    attach(model, None)
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(MethodError, match="LBFGS keeps a history"):
        optimizer.step(lambda: 0.0)


# Loaded weights and copies ------------------------------------------------------------------------


def test_earlier_weights_need_the_states_that_belong_to_them() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = attach(model, optimizer)
    train(model, optimizer, 3)
    parts = (model, optimizer, sparsifier)
    early = copy.deepcopy([part.state_dict() for part in parts])
    train(model, optimizer, 3)
    model.load_state_dict(early[0])
    optimizer.zero_grad()
    backward(model)
    with pytest.raises(StateError, match="others than after step 6: a state was loaded"):
        optimizer.step()
    for part, state in zip(parts, early, strict=True):
        part.load_state_dict(state)
    train(model, optimizer, 3)
    assert sparsifier.step == 6


def test_an_average_is_refused_before_connections_move() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = attach(model, optimizer, RigL(period=3, end=1.0))
    average = AveragedModel(model)
    graphs = sparsifier.selected()
    for _ in range(2):
        train(model, optimizer, 1)
        average.update_parameters(model)
    assert average(torch.zeros(2, 20)).shape == (2, 20)
    with pytest.raises(StateError, match="values of different connections"):
        train(model, optimizer, 1)
    assert sparsifier.churn(graphs) == 0


def test_an_average_over_moves_is_refused_when_it_is_used() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer)
    average = AveragedModel(model)
    train(model, optimizer, 3)
    average.update_parameters(model)
    for use in (lambda: average(torch.zeros(2, 20)), average.state_dict):
        with pytest.raises(StateError, match="connections of the layer have moved"):
            use()


def test_averages_after_the_last_move_and_of_dense_copies_are_fine() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = attach(model, optimizer, RigL(period=1, end=0.5))
    dense = AveragedModel(to_dense(copy.deepcopy(model)))
    for _ in range(10):
        train(model, optimizer, 1)
        dense.update_parameters(to_dense(copy.deepcopy(model)))
    late = AveragedModel(model)
    for _ in range(10):
        train(model, optimizer, 1)
        late.update_parameters(model)
    assert late(torch.zeros(2, 20)).shape == dense(torch.zeros(2, 20)).shape
    sparsifier.finalize()
    with pytest.raises(StateError, match="have connections of their own"):
        sparsifier.project(late)


def test_copies_that_are_trained_go_their_own_way() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = attach(model, optimizer)
    train(model, optimizer, 2)
    other = copy.deepcopy(model)
    second = torch.optim.SGD(other.parameters(), lr=0.1)
    train(model, optimizer, 2)
    train(other, second, 4)
    train(model, optimizer, 2)
    other.eval()
    assert other(torch.zeros(2, 20)).shape == (2, 20)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(torch.ones(2, 20)), model(torch.ones(2, 20)))
    assert sparsifier.step == 6


def test_values_that_others_train_are_told() -> None:
    model = network()
    attach(model, None)

    def step_by_hand(count: int) -> None:
        for step in range(count):
            model.zero_grad()
            backward(model, step)
            for p in model.parameters():
                p.data.sub_(p.grad, alpha=0.1)

    with pytest.warns(UserWarning, match="'0.values', '2.values' changed in 10 backward passes"):
        step_by_hand(12)


def test_momentum_follows_where_optimizers_take_turns_by_phase() -> None:
    model = network()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for _ in range(2))
    sparsifier = attach(model, first)
    train(model, first, 2)
    with pytest.warns(UserWarning, match="it takes its place"):
        train(model, second, 2)
    train(model, first, 2)  # known: nothing is said again
    for optimizer in (first, second):
        sizes = {p: s["momentum_buffer"].shape for p, s in optimizer.state.items()}
        assert all(size == p.shape for p, size in sizes.items())
    assert sparsifier.step == 6


def test_a_second_sparsifier_sees_the_gradients_of_its_first_step() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = attach(model, optimizer)
    with pytest.warns(UserWarning, match="that one ends here"):
        second = attach(model, optimizer)
    first.finalize()
    before = second.selected()
    train(model, optimizer, 1)
    assert second.churn(before) > 0


def test_layers_that_a_batch_skips_are_told_once() -> None:
    model = nn.ModuleList([network(), network()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer)

    def steps(count: int) -> None:
        for step in range(count):
            optimizer.zero_grad()
            backward(model[0], step)
            optimizer.step()

    with pytest.warns(UserWarning, match="Experts that a batch skips are fine"):
        steps(1)
    steps(3)


def test_one_clipped_entry_is_fine() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = attach(model, optimizer)
    backward(model)
    grad = model[2].values.grad
    assert grad is not None
    bound = float(grad.abs().topk(2).values.mean())
    grad.clamp_(-bound, bound)
    optimizer.step()
    assert sparsifier.step == 1


def test_no_step_at_all_is_told_at_the_end() -> None:
    sparsifier = attach(network(), None)
    with pytest.warns(UserWarning, match="after 0 of 20 steps: no connection has moved"):
        sparsifier.finalize()


def test_states_stay_what_they_were() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = attach(model, optimizer, DSTEE(period=1, end=1.0))
    state = sparsifier.state_dict()
    saved = copy.deepcopy(state)
    train(model, optimizer, 3)
    for name, (held,) in state["weights"].items():
        assert torch.equal(held["rounds"], saved["weights"][name][0]["rounds"])
    with pytest.raises(StateError, match="saved after step -1"):
        sparsifier.load_state_dict({**saved, "step": -1})
    with pytest.raises(StateError, match="is damaged"):
        sparsifier.load_state_dict({**saved, "weights": None})
