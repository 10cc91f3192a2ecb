"""Soft top-k against vectors at 80 digits, closed forms, and its own invariances."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spartan import soft_topk
from spartan.errors import BudgetError
from spartan.kernels import Scores
from spartan.selection.soft import DualSearch, soft_rows, solve_all


def solve_case(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    values = torch.tensor(case["values"], dtype=torch.float64, requires_grad=True)
    costs = torch.tensor(case["costs"], dtype=torch.float64)
    mask = soft_topk(values, case["budget"], costs, beta=case["beta"])
    mask.backward(torch.tensor(case["upstream_grad"], dtype=torch.float64))
    assert values.grad is not None
    return mask.detach(), values.grad


def test_masks_and_gradients_match_the_vectors(vectors: dict[str, Any]) -> None:
    for case in vectors["soft_topk"]:
        mask, grad = solve_case(case)
        expected = torch.tensor(case["mask"], dtype=torch.float64)
        torch.testing.assert_close(mask, expected, rtol=0, atol=1e-12, msg=case["name"])
        expected = torch.tensor(case["grad_values"], dtype=torch.float64)
        atol = 1e-9 * max(1.0, case["beta"])
        torch.testing.assert_close(grad, expected, rtol=0, atol=atol, msg=case["name"])
        assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("seed", range(5))
def test_gradcheck(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(9, dtype=torch.float64, generator=generator).requires_grad_()
    costs = torch.rand(9, dtype=torch.float64, generator=generator) + 0.2
    budget = float(costs.sum()) * (0.1 + 0.15 * seed)
    beta = [0.5, 1.0, 5.0, 12.0, 20.0][seed]
    assert torch.autograd.gradcheck(lambda v: soft_topk(v, budget, costs, beta=beta), [values])


def mass_error(values: Tensor, budget: float, beta: float, costs: Tensor | None = None) -> float:
    mask = soft_topk(values, budget, costs, beta=beta).double()
    assert float(mask.min()) >= 0
    assert float(mask.max()) <= 1
    return abs(float((mask if costs is None else mask * costs).sum()) - budget) / budget


@pytest.mark.parametrize("beta", [1e-2, 1.0, 20.0, 1e3, 1e6])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "two clusters", "heavy tail"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mass_is_met_for_every_sharpness(dtype: torch.dtype, kind: str, beta: float) -> None:
    generator = torch.Generator().manual_seed(7)
    n = 20_000
    normal = torch.randn(n, dtype=torch.float64, generator=generator)
    values = {
        "normal": normal.abs(),
        "ties": (4 * normal).round().abs() / 4,
        "zeros": torch.zeros(n, dtype=torch.float64),
        "two clusters": (normal > 1).double(),
        "heavy tail": (3 * normal).exp(),
    }[kind].to(dtype)
    for budget in (1.0, 0.05 * n, n / 2, n - 1.0, n * 1.0):
        tolerance = 1e-6 if dtype == torch.float64 else 1e-4
        assert mass_error(values, budget, beta) <= tolerance, budget


@pytest.mark.parametrize("beta", [0.01, 5.0, 1e4])
def test_extreme_costs(beta: float) -> None:
    generator = torch.Generator().manual_seed(3)
    costs = 10 ** (12 * torch.rand(500, dtype=torch.float64, generator=generator) - 6)
    values = torch.rand(500, dtype=torch.float64, generator=generator) * costs
    for fraction in (1e-9, 1e-3, 0.5, 1 - 1e-6):
        assert mass_error(values, fraction * float(costs.sum()), beta, costs) <= 1e-6


def test_single_entry_and_full_and_empty_budgets() -> None:
    value = torch.tensor([0.3], requires_grad=True)
    mask = soft_topk(value, 0.5, beta=7.0)
    mask.backward()
    assert mask.item() == pytest.approx(0.5)
    assert value.grad is not None
    assert value.grad.item() == 0.0
    values = torch.rand(5, requires_grad=True)
    for budget, expected in ((5, 1.0), (0, 0.0)):
        mask = soft_topk(values, budget, beta=3.0)
        assert mask.tolist() == [expected] * 5
        (grad,) = torch.autograd.grad(mask.sum(), values)
        assert grad.tolist() == [0.0] * 5


def test_dtype_of_the_mask() -> None:
    for given_dtype, expected in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ]:
        values = torch.rand(8).to(given_dtype).requires_grad_()
        mask = soft_topk(values, 2, beta=3.0)
        assert mask.dtype == expected
        (grad,) = torch.autograd.grad(mask.square().sum(), values)
        assert grad.dtype == given_dtype


small = st.lists(st.floats(0, 3), min_size=2, max_size=12)


@settings(deadline=None, max_examples=100)
@given(small, st.floats(0.05, 0.95), st.floats(0.05, 50.0), st.randoms())
def test_invariances(values: list[float], density: float, beta: float, random: Any) -> None:
    v = torch.tensor(values, dtype=torch.float64)
    n = len(values)
    k = density * n
    mask = soft_topk(v, k, beta=beta)
    close = {"rtol": 0, "atol": 1e-9}
    order = list(range(n))
    random.shuffle(order)
    torch.testing.assert_close(soft_topk(v[order], k, beta=beta), mask[order], **close)
    torch.testing.assert_close(soft_topk(v + 0.7, k, beta=beta), mask, **close)
    torch.testing.assert_close(soft_topk(3 * v, k, beta=beta / 3), mask, **close)
    torch.testing.assert_close(soft_topk(-v, n - k, beta=beta), 1 - mask, **close)
    doubled = soft_topk(2 * v, 2 * k, torch.full_like(v, 2.0), beta=beta)
    torch.testing.assert_close(doubled, mask, **close)
    assert bool((mask[v.argsort()].diff() >= -1e-12).all())


@settings(deadline=None, max_examples=60)
@given(small, st.floats(0.05, 0.95), st.floats(0.05, 50.0))
def test_gradient_spends_no_budget(values: list[float], density: float, beta: float) -> None:
    v = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    costs = torch.linspace(0.5, 2.0, len(values), dtype=torch.float64)
    mask = soft_topk(v, density * float(costs.sum()), costs, beta=beta)
    upstream = torch.linspace(-1, 1, len(values), dtype=torch.float64)
    (grad,) = torch.autograd.grad(mask, v, upstream, retain_graph=True)
    # The Jacobian's null vector is c: moving all values along the costs moves nothing.
    assert float((costs * grad).sum()) == pytest.approx(0.0, abs=1e-9 * beta)
    (grad,) = torch.autograd.grad(mask, v, costs)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-9 * beta)


def test_two_entries_have_a_closed_form() -> None:
    mask = soft_topk(torch.tensor([0.9, 0.2], dtype=torch.float64), 1.0, beta=4.0)
    assert mask[0].item() == pytest.approx(1 / (1 + math.exp(-4.0 * 0.7 / 2)), abs=1e-14)


def test_solver_takes_few_passes_from_any_start() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200_000, generator=generator, dtype=torch.float64).abs()
    scores = Scores([values], [1.0], [1.0], absolute=False)
    for beta in (1.0, 100.0, 1e5):
        for density in (0.5, 0.05, 0.01):
            budget = density * values.numel()
            masks = []
            for reference, start in ((float(values.quantile(1 - density)), 0.0), (0.0, 50.0)):
                search = DualSearch(scores, budget, beta, reference, start)
                solve_all([search])
                assert search.passes <= 30
                masks.append(search.dual.mask(values))
            torch.testing.assert_close(masks[0], masks[1], rtol=0, atol=1e-9)


def test_rows_solve_each_row_alone() -> None:
    scores = torch.rand(50, 8, dtype=torch.float64)
    mask = soft_rows(scores, 3.0, 12.0, scores.amax(1, keepdim=True))
    for row, expected in zip(scores, mask, strict=True):
        torch.testing.assert_close(soft_topk(row, 3.0, beta=12.0), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_bad_beta_is_refused(beta: float) -> None:
    with pytest.raises(BudgetError, match="beta"):
        soft_topk(torch.rand(4), 2, beta=beta)
