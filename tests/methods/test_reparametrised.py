"""Powerpropagation and DPF against their vectors."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import spartan
from spartan import Block, Budget, Sparsifier
from spartan.errors import MethodError
from spartan.methods import DPF, Powerpropagation
from tests.conftest import VECTORS

FACTS: dict[str, Any] = json.loads(
    (VECTORS / "hardconcrete_vectors.json").read_text(encoding="utf-8")
)["related_methods"]


def layer_of(values: list[float]) -> nn.Linear:
    layer = nn.Linear(len(values), 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values], dtype=torch.float64))
    return layer


@pytest.mark.parametrize("fact", FACTS["powerpropagation"], ids=lambda f: f"alpha={f['alpha']}")
def test_powerpropagation(fact: dict[str, Any]) -> None:
    layer = layer_of(fact["weight"])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    method = Powerpropagation(alpha=fact["alpha"])
    sparsifier = Sparsifier(layer, optimizer, method, Budget(density=1.0), 10)
    close = {"rtol": 0, "atol": 1e-12}
    (weight,) = sparsifier.weights
    theta = torch.tensor([fact["theta"]], dtype=torch.float64)
    torch.testing.assert_close(weight.latent, theta, **close)
    torch.testing.assert_close(
        layer.weight.detach(), torch.tensor([fact["weight"]], dtype=torch.float64), **close
    )
    layer.weight.grad = torch.tensor([fact["grad_weight"]], dtype=torch.float64)
    optimizer.step()
    expected = torch.tensor([fact["grad_theta"]], dtype=torch.float64)
    torch.testing.assert_close(layer.weight.grad, expected, **close)
    torch.testing.assert_close(weight.latent, theta - expected, **close)
    small = method.to_latent(weight, torch.tensor([0.04], dtype=torch.float64))
    assert float(small) == pytest.approx(fact["init_theta_from_dense_0p04"], abs=1e-12)


@given(
    alpha=st.floats(1, 6),
    values=st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4),
)
@settings(max_examples=50, deadline=None)
def test_powerpropagation_is_finite_at_zero(alpha: float, values: list[float]) -> None:
    layer = layer_of([0.0, -0.0, *values])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    sparsifier = Sparsifier(layer, optimizer, Powerpropagation(alpha=alpha), Budget(density=0.5), 4)
    for _ in range(4):
        optimizer.zero_grad()
        layer(torch.ones(1, 6, dtype=torch.float64)).mean().backward()
        optimizer.step()
        assert bool(torch.isfinite(layer.weight).all())
        assert bool(torch.isfinite(layer.weight.grad).all())
    sparsifier.finalize()
    assert sparsifier.weights[0].kept == 3


def test_powerpropagation_ranks_units_by_weights_not_by_their_roots() -> None:
    # Two blocks: the sum of |w| is larger in the first, the sum of |w|^(1/3) in the second.
    layer = layer_of([1.0, 0.0, 0.45, 0.45])
    sparsifier = Sparsifier(
        layer, torch.optim.SGD(layer.parameters(), lr=0.1),
        Powerpropagation(alpha=3.0, schedule="one-shot"), Budget(density=0.5), 4,
        pattern=Block(1, 2),
    )  # fmt: skip
    assert sparsifier.weights[0].mask.flatten().tolist() == [True, False]


def test_weights_written_from_outside_become_the_latent_ones() -> None:
    layer = layer_of([1.0, 2.0, 3.0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    Sparsifier(layer, optimizer, Powerpropagation(alpha=2.0), Budget(density=1.0), 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4.0, 9.0, 16.0]]))
    layer.weight.grad = torch.zeros_like(layer.weight)
    with pytest.warns(UserWarning, match="written outside"):
        optimizer.step()
    assert layer.weight.flatten().tolist() == pytest.approx([4.0, 9.0, 16.0])


def test_dpf_one_step() -> None:
    fact = FACTS["dpf_one_step"]
    layer = layer_of(fact["dense_w"])
    optimizer = torch.optim.SGD(layer.parameters(), lr=fact["lr"])
    sparsifier = Sparsifier(
        layer, optimizer, DPF(period=1, end=0.0), Budget(density=fact["density"]), 10
    )
    (weight,) = sparsifier.weights
    assert weight.mask.flatten().int().tolist() == fact["mask"]
    assert layer.weight.flatten().tolist() == fact["weights_used_in_forward"]
    layer.weight.grad = torch.tensor([fact["grad_at_masked_weights"]], dtype=torch.float64)
    optimizer.step()
    assert weight.latent.flatten().tolist() == pytest.approx(fact["dense_w_next"], abs=1e-12)
    again = spartan.hard_topk(weight.latent.abs(), fact["keep"])
    assert again.flatten().int().tolist() == fact["mask_recomputed"]


def test_dpf_moves_its_masks_every_period_and_lets_pruned_weights_return() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(20, 20)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    sparsifier = Sparsifier(layer, optimizer, DPF(period=4, end=0.5), Budget(density=0.2), 40)
    (weight,) = sparsifier.weights
    before, ever_pruned, returned = weight.mask.clone(), torch.zeros(20, 20, dtype=torch.bool), 0
    for step in range(1, 41):
        optimizer.zero_grad()
        layer(torch.randn(16, 20)).sub(1.0).square().mean().backward()
        optimizer.step()
        if not torch.equal(weight.mask, before):
            assert step % 4 == 0
            assert step <= 20
        returned += int((weight.mask & ever_pruned).sum())
        ever_pruned |= ~weight.mask
        before = weight.mask.clone()
    assert returned > 0
    error = sparsifier.monitor()["pruning_error"]
    pruned = weight.latent[~weight.mask].square().sum() / weight.latent.square().sum()
    assert error == pytest.approx(float(pruned), rel=1e-5)
    sparsifier.finalize()
    assert int(layer.weight.count_nonzero()) == 80


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Powerpropagation(alpha=0.5), "at least 1"),
        (lambda: Powerpropagation(begin=0.9), "begin <= end"),
        (lambda: DPF(period=0), "at least 1"),
        (lambda: DPF(period=1.5), "a number of steps"),
        (lambda: DPF(end=1.5), "between 0 and 1"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make()


def test_methods_can_be_listed() -> None:
    for method in spartan.methods.list():
        assert spartan.methods.METHODS[method.name] is method
        assert method.summary
        assert method.step_cost
        assert method.paper or method in (spartan.methods.Fixed, spartan.methods.Static)
