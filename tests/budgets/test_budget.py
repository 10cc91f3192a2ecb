"""Budgets: integers, costs, allocations, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spartan import NM, Block, Budget, Channel, Unstructured
from spartan.budgets.allocation import erk_densities
from spartan.budgets.flops import trace_flops
from spartan.budgets.group_budget import GroupBudget
from spartan.errors import BudgetError, PatternError
from spartan.weights.patterns import Pattern
from spartan.weights.prunable import find_prunable
from tests.conftest import Net


def plan(model: nn.Module, budget: Budget, pattern: Pattern | None = None) -> list[GroupBudget]:
    return budget.plan(model, find_prunable(model), pattern or Unstructured())


def linear(inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs)


@settings(deadline=None)
@given(st.integers(1, 999), st.integers(1, 40), st.integers(1, 40))
def test_kept_is_the_rounded_decimal(permille: int, rows: int, cols: int) -> None:
    density = permille / 1000
    exact = Fraction(permille, 1000) * rows * cols
    for budget in (Budget(density=density), Budget(sparsity=float(f"{1 - density:.3f}"))):
        if round(exact) == 0:
            with pytest.raises(BudgetError, match="smallest reachable"):
                plan(linear(cols, rows), budget)
        else:
            (share,) = plan(linear(cols, rows), budget)
            assert share.kept == round(exact)


def test_decimals_are_taken_as_written() -> None:
    # int((1 - 0.9) * 100) is 9, and 0.15 * 100 is 15.000000000000002 below one half.
    assert plan(linear(10, 10), Budget(sparsity=0.9))[0].kept == 10
    assert plan(linear(10, 10), Budget(density=0.145))[0].kept == 14  # half to even
    assert plan(linear(10, 10), Budget(density=0.155))[0].kept == 16


def test_uniform_rounds_each_layer(make_net: Callable[..., Net]) -> None:
    model = make_net()
    shares = plan(model, Budget(density=0.1, allocation="uniform"))
    assert [s.kept for s in shares] == [29, 205, 13]  # 288, 2048, 128 weights
    assert all(s.counted for s in shares)


def test_erk_matches_the_vectors(vectors: dict[str, Any]) -> None:
    for case in vectors["erk"]:
        shapes = [tuple(s) for s in case["shapes"]]
        assert erk_densities(shapes, case["density"]) == pytest.approx(
            case["layer_densities"], abs=1e-12
        )


def test_erk_hits_the_total(make_net: Callable[..., Net]) -> None:
    model = make_net()
    total = sum(w.parameter.numel() for w in find_prunable(model))
    for density in (0.02, 0.1, 0.33, 0.5, 0.9, 1.0):
        shares = plan(model, Budget(density=density, allocation="erk"))
        assert sum(s.kept for s in shares) == round(density * total)
        assert all(0 < s.kept <= s.total for s in shares)


def test_mapping_allocation(make_net: Callable[..., Net]) -> None:
    model = make_net()
    budget = Budget(density=0.5, allocation={"conv": 1.0, "fc1.weight": 0.1})
    assert [s.kept for s in plan(model, budget)] == [288, 205, 64]
    with pytest.raises(BudgetError, match="no density for 'conv.weight'"):
        plan(model, Budget(allocation={"fc1": 0.1}))
    with pytest.raises(BudgetError, match="did you mean 'fc1"):
        plan(model, Budget(density=0.5, allocation={"fc11": 0.1}))
    with pytest.raises(BudgetError, match=r"outside \[0, 1\]"):
        plan(model, Budget(density=0.5, allocation={"fc1": 1.1}))


def test_density_of_all_parameters(vectors: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(90, 10), nn.LayerNorm(10))  # 900 prunable of 930
    (share,) = plan(model, Budget(density=0.5, count="all"))
    assert share.kept == 465 - 30
    with pytest.raises(BudgetError, match="smallest reachable density is 0.033334"):
        plan(model, Budget(density=0.03, count="all"))
    for case in vectors["density_adjustment"]:
        total, masked = case["total_params"], case["masked_params"]
        if masked > 10**6:
            continue
        wrapped = nn.Sequential(nn.Linear(1, masked, bias=False), nn.LayerNorm(1))
        wrapped[1].weight = nn.Parameter(torch.ones(total - masked))
        wrapped[1].bias = None
        budget = Budget(density=case["target_density"], count="all")
        if case["adjusted_density"] == 0:
            with pytest.raises(BudgetError):
                plan(wrapped, budget)
        else:
            (share,) = plan(wrapped, budget)
            assert share.kept == round(case["adjusted_density"] * masked)


def test_flops_of_convolution_attention_and_reuse() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
            self.up = nn.ConvTranspose1d(8, 6, 4, stride=2)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.twice = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.up(self.conv(x).flatten(2)).transpose(1, 2)
            y = self.attention(y, y, y)[0]
            return self.twice(self.twice(y))

    model = Model()
    weights = find_prunable(model)
    flops = dict(
        zip(
            [w.name for w in weights],
            trace_flops(model, weights, torch.zeros(1, 4, 8, 8)),
            strict=True,
        )
    )
    positions, length = 16, 15 * 2 + 4
    assert flops["conv.weight"] == 2 * positions
    assert flops["up.weight"] == 2 * positions
    assert flops["attention.in_proj_weight"] == 2 * length
    assert flops["attention.out_proj.weight"] == 2 * length
    assert flops["twice.weight"] == 2 * 2 * length
    assert model.training


def test_flops_budget_is_not_exceeded(make_net: Callable[..., Net]) -> None:
    model = make_net()
    budget = Budget(density=0.3, cost="flops", example_input=torch.zeros(2, 4, 4, 4))
    (share,) = plan(model, budget)
    ratio = share.costs[0] / share.costs[1]
    assert ratio == pytest.approx(16.0)  # 4 x 4 positions against one row
    assert share.kept == pytest.approx(0.3 * share.total)
    assert not share.counted
    unreached = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    unreached.forward = unreached["a"].forward  # type: ignore[method-assign]
    with pytest.raises(BudgetError, match="does not reach 'b.weight'"):
        plan(unreached, Budget(density=0.5, cost="flops", example_input=torch.zeros(1, 4)))


def test_cost_mapping(make_net: Callable[..., Net]) -> None:
    model = make_net()
    costs = {"conv": 4.0, "fc1": 1.0, "fc2": 2.0}
    (share,) = plan(model, Budget(density=0.3, cost=costs))
    assert share.costs[0] / share.costs[1] == pytest.approx(4.0)
    with pytest.raises(BudgetError, match="no cost for 'fc2.weight'"):
        plan(model, Budget(density=0.3, cost={"conv": 1.0, "fc1": 1.0}))
    with pytest.raises(BudgetError, match="must be positive"):
        plan(model, Budget(density=0.3, cost={**costs, "fc1": 0.0}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "Give a density"),
        ({"density": 0.1, "sparsity": 0.9}, "not both"),
        ({"density": 0.0}, r"must lie in \(0, 1\]"),
        ({"density": 1.5}, r"must lie in \(0, 1\]"),
        ({"density": float("nan")}, r"must lie in \(0, 1\]"),
        ({"sparsity": 1.0}, r"must lie in \[0, 1\)"),
        ({"density": 0.1, "cost": "flop"}, "did you mean 'flops'"),
        ({"density": 0.1, "cost": "flops"}, "example_input"),
        ({"density": 0.1, "allocation": "globl"}, "did you mean 'global'"),
        ({"density": 0.1, "count": "al"}, "did you mean 'all'"),
        ({"density": 0.1, "count": "all", "cost": {"a": 1.0}}, "count='all'"),
    ],
)
def test_bad_budgets_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**fields)


def test_thirds_fit_one_of_three() -> None:
    (share,) = plan(linear(6, 4), Budget(density=1 / 3), NM(1, 3))
    assert (share.kept, share.total) == (1, 3)


def test_unreachable_budgets_are_refused(make_net: Callable[..., Net]) -> None:
    model = make_net()
    with pytest.raises(BudgetError, match="keeps none of 2,464 units"):
        plan(model, Budget(density=1e-5))
    with pytest.raises(BudgetError, match="keeps nothing of 'fc2.weight'"):
        plan(model, Budget(density=0.003, allocation="uniform"))
    with pytest.raises(BudgetError, match="cheapest unit"):
        plan(model, Budget(density=1e-5), Channel())
    with pytest.raises(BudgetError, match="exactly 2 of every 4"):
        plan(model, Budget(density=0.4), NM(2, 4))
    with pytest.raises(PatternError, match="'conv.weight' with 8 outputs and 4 inputs"):
        plan(model, Budget(density=0.5), Block(4, 3))
