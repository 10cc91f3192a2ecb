"""Dual updates against their vectors, and against the library cooper where it is installed."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spartan.multipliers import Ascent, DualRule, Multiplicative, NuPI
from tests.conftest import VECTORS

FACTS: dict[str, Any] = json.loads(
    (VECTORS / "hardconcrete_vectors.json").read_text(encoding="utf-8")
)["dual_updates"]
violations = st.lists(st.floats(-2, 2), min_size=1, max_size=30)


def trajectory(rule: DualRule, sequence: list[float], memory: float | None = None) -> list[float]:
    multiplier, found = 0.0, []
    for violation in sequence:
        multiplier, memory = rule.update(multiplier, violation, memory)
        found.append(multiplier)
    return found


def test_ascent() -> None:
    for restart, key in ((False, "gradient_ascent"), (True, "gradient_ascent_with_dual_restart")):
        found = trajectory(Ascent(FACTS["eta"], restart), FACTS["violations"])
        assert found == pytest.approx(FACTS[key], abs=1e-12)


@pytest.mark.parametrize("fact", FACTS["nupi"], ids=lambda f: f"{f['kp']}-{f['init']}")
def test_nupi(fact: dict[str, Any]) -> None:
    rule = NuPI(FACTS["eta"], fact["kp"], fact["ki"], fact["ema_nu"])
    first, *rest = FACTS["violations"]
    if fact["init"] == "cooper_sgd":
        # Its first step has no proportional term, and then forgets the first violation.
        start, _ = rule.update(0.0, first, memory=first)
        found, multiplier, memory = [start], start, 0.0
        for violation in rest:
            multiplier, memory = rule.update(multiplier, violation, memory)
            found.append(multiplier)
    else:
        memory = first if fact["init"] == "xi0_equals_e0" else None
        found = trajectory(rule, FACTS["violations"], memory)
    assert found == pytest.approx(fact["trajectory"], abs=1e-12)


@given(sequence=violations)
def test_restarts_reset_exactly(sequence: list[float]) -> None:
    for violation, after in zip(sequence, trajectory(Ascent(0.1), sequence), strict=True):
        assert after >= 0
        if violation < 0:
            assert after == 0.0


@given(sequence=violations, kp=st.floats(0, 20))
def test_nupi_without_a_proportional_term_is_ascent(sequence: list[float], kp: float) -> None:
    plain = trajectory(Ascent(0.1, restart=False), sequence)
    assert trajectory(NuPI(0.1, 0.0), sequence) == pytest.approx(plain, abs=1e-12)
    assert all(x >= 0 for x in trajectory(NuPI(0.1, kp), sequence))
    signed = trajectory(NuPI(0.1, kp, signed=True), sequence)
    expected = 0.1 * (sum(sequence) + kp * sequence[-1])
    assert signed[-1] == pytest.approx(expected, abs=1e-9)


@given(sequence=violations, kp=st.floats(0, 20), smoothing=st.sampled_from([0.0, 0.5, 0.9]))
def test_nupi_agrees_with_cooper(sequence: list[float], kp: float, smoothing: float) -> None:
    optim = pytest.importorskip("cooper.optim", reason="cooper-optim is not installed")
    multiplier = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = optim.nuPI(
        [multiplier], lr=0.1, Kp=kp, Ki=1.0, ema_nu=smoothing,
        init_type=optim.torch_optimizers.nupi_optimizer.nuPIInitType.ZEROS, maximize=True,
    )  # fmt: skip
    expected = []
    for violation in sequence:
        multiplier.grad = torch.tensor(violation, dtype=torch.float64)
        optimizer.step()
        multiplier.data.clamp_(min=0.0)
        expected.append(float(multiplier))
    found = trajectory(NuPI(0.1, kp, smoothing=smoothing), sequence)
    # Its gains are float32.
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


@given(
    violations=st.lists(st.floats(0.001, 2), min_size=1, max_size=30), sign=st.sampled_from((1, -1))
)
def test_multiplicative_follows_the_sign_of_the_violation(
    violations: list[float], sign: int
) -> None:
    rule = Multiplicative(rise=0.05, fall=0.005, maximum=100.0)
    before, memory = 10.0, None
    for violation in violations:
        now, memory = rule.update(before, sign * violation, memory)
        assert (now >= before) if sign > 0 else (now <= before)
        assert 0 < now <= 100.0
        before = now


def test_multiplicative_without_violation_stays() -> None:
    rule = Multiplicative(rise=0.05, fall=0.005, maximum=100.0)
    multiplier, memory = 3.0, None
    for _ in range(1000):
        multiplier, memory = rule.update(multiplier, 0.0, memory)
    assert multiplier == pytest.approx(3.0, abs=1e-12)


def test_multiplicative_by_hand() -> None:
    rule = Multiplicative(rise=0.1, fall=0.01, maximum=5.0, smoothing=0.5)
    first, memory = rule.update(1.0, 0.4, None)
    assert (first, memory) == (pytest.approx(math.exp(0.1 * 0.4)), 0.4)
    second, memory = rule.update(first, -2.0, memory)
    assert memory == pytest.approx(-0.8)
    assert second == pytest.approx(first * math.exp(-0.01 * 0.8))
    clipped, _ = rule.update(1.0, -1000.0, None)
    assert clipped == pytest.approx(math.exp(-0.01))
    assert rule.update(4.9, 1.0, None)[0] == 5.0
    assert Multiplicative(0.1, 0.1, minimum=0.5).update(0.51, -1.0, None)[0] == 0.5
