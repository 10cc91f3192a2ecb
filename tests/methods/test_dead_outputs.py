"""Outputs that keep nothing cannot blow up through the norms behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spartan import Block, Budget, Channel, Sparsifier, Unstructured
from spartan.methods import DPF, DualAveraging, Spartan
from spartan.methods.masking.dead_outputs import hold_dead_outputs
from spartan.methods.masking.groups import make_group
from spartan.weights.prunable import Prunable
from tests.conftest import examples

SHAPES = {
    "matrix": ((6, 8), False, False, 0),
    "inputs first": ((8, 6), True, False, 1),
    "kernel": ((6, 4, 3, 2), False, False, 0),
    "experts": ((2, 6, 4), False, True, (0, 1)),
    "experts, inputs first": ((2, 4, 6), True, True, (0, 2)),
}


def masked(name: str, pattern: Any) -> Any:
    shape, input_first, stacked, _ = SHAPES[name]
    prunable = Prunable("w", nn.Parameter(torch.randn(shape)), input_first, stacked)
    (budget,) = Budget(density=0.5).plan(nn.Module(), [prunable], pattern)
    (weight,) = make_group(budget, [prunable], pattern).weights
    weight.mask = torch.rand(weight.mask.shape) < 0.4
    return weight


def norms(x: Tensor, name: str) -> Tensor:
    """Return the norm of each output, experts one after the other; cut here by hand."""
    dims = SHAPES[name][3]
    rows = x.movedim(dims, (0, 1)) if isinstance(dims, tuple) else x.movedim(dims, 0)
    outputs = rows.flatten(0, 1) if isinstance(dims, tuple) else rows
    return outputs.flatten(1).norm(dim=1)


@given(st.integers(0, 10**6), st.sampled_from([*SHAPES]), st.sampled_from([0, 1, 2, 3]))
@settings(max_examples=examples(100))
def test_dead_outputs_are_held_and_others_left(seed: int, name: str, which: int) -> None:
    torch.manual_seed(seed)
    pattern = [Unstructured(), Block(2, 2), Channel(), Channel(inputs=True)][which]
    weight = masked(name, pattern)
    grad = torch.randn_like(weight.parameter) * torch.rand(()).mul(6).exp()
    alive = norms(weight.spread(weight.mask).float(), name) > 0
    dims = SHAPES[name][3]
    dims = dims if isinstance(dims, tuple) else (dims,)
    blown = torch.where(torch.rand(weight.parameter.shape) < 0.5, 300.0, 1.0)
    blown = blown.amax([d for d in range(grad.dim()) if d not in dims], keepdim=True)
    weight.prunable.parameter.grad = grad = grad * blown
    before = grad.clone()
    hold_dead_outputs([weight])
    was, now = norms(before, name), norms(grad, name)
    assert torch.equal(now[alive], was[alive])
    if bool(alive.any()):
        most = was[alive].mean()
        wanted = torch.where(alive, was, was.clamp(max=most))
        torch.testing.assert_close(now, wanted, rtol=1e-4, atol=1e-6)
    else:
        assert torch.equal(before, grad)


def test_gradients_keep_their_direction() -> None:
    weight = masked("matrix", Unstructured())
    weight.mask = torch.zeros_like(weight.mask)
    weight.mask[0] = True
    weight.prunable.parameter.grad = grad = torch.randn(6, 8) * 100
    grad[0] /= 100
    before = grad.clone()
    hold_dead_outputs([weight])
    ratio = grad / before
    torch.testing.assert_close(ratio, ratio[:, :1].expand(6, 8), rtol=1e-4, atol=0)


def test_where_a_weight_keeps_nothing_the_others_say_what_is_ordinary() -> None:
    dead, living = masked("matrix", Unstructured()), masked("kernel", Unstructured())
    dead.mask = torch.zeros_like(dead.mask)
    living.mask = torch.ones_like(living.mask)
    for weight in (dead, living):
        weight.prunable.parameter.grad = torch.randn_like(weight.parameter)
    dead.grad.mul_(1e4)
    before = living.grad.clone()
    hold_dead_outputs([dead, living])
    assert torch.equal(living.grad, before)
    most = norms(before, "kernel").mean().expand(6)
    torch.testing.assert_close(norms(dead.grad, "matrix"), most, rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:N(othing|ext to nothing) is kept")
@pytest.mark.parametrize("method", [Spartan(), DualAveraging(), DPF(period=2)], ids=repr)
def test_networks_with_norms_stay_whole_at_high_sparsity(method: Any) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((32, 96), (96, 96), (96, 96)):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(96, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps = 150
    sparsifier = Sparsifier(model, optimizer, method, Budget(density=0.03, allocation="erk"), steps)
    start = max(float(w.latent.abs().max()) for w in sparsifier.weights)
    for step in range(steps):
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), x[:, :8].argmax(1))
        loss.backward()
        optimizer.step()
    # Otherwise latent weights grow 10¹²-fold under dual averaging and DPF; chance is log 8 = 2.08.
    assert max(float(w.latent.abs().max()) for w in sparsifier.weights) < 1000 * start
    assert float(loss) < 1.3
    sparsifier.finalize()
