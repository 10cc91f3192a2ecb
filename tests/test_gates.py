"""Gates against their vectors and closed forms."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spartan import gates
from tests.conftest import VECTORS

FACTS: dict[str, Any] = json.loads(
    (VECTORS / "hardconcrete_vectors.json").read_text(encoding="utf-8")
)
EXACT = {"rtol": 0, "atol": 1e-12}
log_alphas = st.floats(-9, 9)
uniforms = st.floats(1e-6, 1 - 1e-6)


def double(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_vectors(dtype: torch.dtype) -> None:
    close = EXACT if dtype == torch.float64 else {"rtol": 0, "atol": 2e-6}
    for fact in FACTS["gates"]:
        a = torch.tensor(fact["log_alpha"], dtype=dtype)
        expected = {k: torch.tensor(v, dtype=dtype) for k, v in fact.items() if k != "samples"}
        p = gates.open_probability(a)
        torch.testing.assert_close(p, expected["p_active"], **close)
        torch.testing.assert_close(p * (1 - p), expected["dp_active_dlog_alpha"], **close)
        # P(z = 1 | a) = P(z = 0 | -a)
        torch.testing.assert_close(1 - gates.open_probability(-a), expected["p_one"], **close)
        torch.testing.assert_close(gates.median(a), expected["median_gate"], **close)
        if dtype == torch.float64:
            for u, z in fact["samples"].items():
                found = gates.sample(a, double(float(u)))[0]
                torch.testing.assert_close(found, double(z), **close)


def test_constants() -> None:
    assert (
        pytest.approx(FACTS["constants"]["shift_minus_T_log_minus_gamma_over_zeta"], abs=1e-14)
        == gates.KAPPA
    )
    for fact in FACTS["init"]:
        assert gates.log_alpha_at(fact["p_active"]) == pytest.approx(fact["log_alpha"], abs=1e-12)


def test_means() -> None:
    """Draws have the mean that integration gives."""
    generator = torch.Generator().manual_seed(0)
    for fact in FACTS["gates"][::4]:
        a = torch.full((1_000_000,), fact["log_alpha"], dtype=torch.float64)
        z, _ = gates.draw(a, generator)
        assert float(z.mean()) == pytest.approx(fact["mean_gate"], abs=1.5e-3)
        assert float((z > 0).double().mean()) == pytest.approx(fact["p_active"], abs=2e-3)


@given(a=log_alphas, u=uniforms)
def test_symmetry(a: float, u: float) -> None:
    one = gates.sample(double(a), double(u))[0]
    other = gates.sample(double(-a), double(1 - u))[0]
    torch.testing.assert_close(one, 1 - other, rtol=0, atol=1e-9)


@given(a=log_alphas, b=log_alphas, u=uniforms, v=uniforms)
def test_monotone(a: float, b: float, u: float, v: float) -> None:
    low = gates.sample(double(min(a, b)), double(min(u, v)))[0]
    high = gates.sample(double(max(a, b)), double(max(u, v)))[0]
    assert float(low) <= float(high)


@given(a=log_alphas)
def test_median_is_open_exactly_above_one_half(a: float) -> None:
    is_open = bool(gates.median(double(a)) > 0)
    assert is_open == (a > -gates.KAPPA)
    if abs(a + gates.KAPPA) > 1e-9:
        assert is_open == bool(gates.open_probability(double(a)) > 0.5)
    assert float(gates.open_median(double(a))) >= float(gates.median(double(a)))
    assert float(gates.open_median(double(a))) > 0.01


@given(a=log_alphas, u=uniforms)
def test_slope_is_the_derivative(a: float, u: float) -> None:
    x = double(a).requires_grad_()
    z, slope = gates.sample(x, double(u))
    (expected,) = torch.autograd.grad(z, x)
    value = float(z.detach())
    if 1e-9 < value < 1 - 1e-9:
        torch.testing.assert_close(slope.detach(), expected, rtol=1e-9, atol=1e-12)
    elif value in (0.0, 1.0):
        assert float(slope.detach()) == 0.0


def test_bernoulli_marginals() -> None:
    generator = torch.Generator().manual_seed(0)
    for g in (-3.0, -1.0, 0.0, 1.0, 3.0):
        logits = torch.full((400_000,), g)
        drawn = gates.bernoulli(logits, gates.logistic_noise(logits, generator))
        assert float(drawn.mean()) == pytest.approx(torch.tensor(g).sigmoid().item(), abs=0.003)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bernoulli_is_exactly_0_or_1(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(10_000, generator=generator, dtype=torch.float64).to(dtype)
    for noise in (None, gates.logistic_noise(logits, generator)):
        drawn = gates.bernoulli(logits, noise)
        assert drawn.dtype == dtype
        assert set(drawn.unique().tolist()) == {0.0, 1.0}


def test_bernoulli_without_noise_is_open_above_one_half() -> None:
    assert gates.bernoulli(torch.tensor([-0.1, 0.0, 0.1])).tolist() == [0.0, 0.0, 1.0]


@given(g=st.floats(-20, 20), noise=st.floats(-10, 10), temperature=st.floats(0.5, 4))
def test_bernoulli_gradient_is_that_of_the_sigmoid(
    g: float, noise: float, temperature: float
) -> None:
    logit = double(g).requires_grad_()
    gates.bernoulli(logit, double(noise), temperature).backward()
    (slope,) = torch.autograd.grad(torch.sigmoid((logit + noise) / temperature), logit)
    torch.testing.assert_close(logit.grad, slope)
