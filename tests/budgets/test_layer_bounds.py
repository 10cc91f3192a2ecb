"""Numbers of units that fit a budget."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spartan.budgets.layer_bounds import LayerBounds, fit_counts, logistic, logit, shift_to
from spartan.errors import BudgetError

layers = st.lists(
    st.tuples(
        st.integers(1, 5_000),  # units
        st.floats(0, 1),  # wished-for density
        st.floats(0.01, 100),  # cost of a unit
        st.floats(0, 1),  # least density
    ),
    min_size=1,
    max_size=6,
)


def limits(rows, share: float, equal: bool) -> LayerBounds:
    units = [n for n, *_ in rows]
    costs = [1.0 if equal else c for _, _, c, _ in rows]
    least = [max(1, math.floor(low * n)) for n, _, _, low in rows]
    floor = sum(k * c for k, c in zip(least, costs, strict=True))
    whole = sum(n * c for n, c in zip(units, costs, strict=True))
    budget = floor + share * (whole - floor)
    names = [str(i) for i in range(len(rows))]
    return LayerBounds(names, units, costs, least, units, round(budget) if equal else budget)


@given(rows=layers, share=st.floats(0, 1), equal=st.booleans())
@settings(max_examples=300, deadline=None)
def test_counts_fit_the_budget_and_no_unit_more_does(rows, share: float, equal: bool) -> None:
    given_limits = limits(rows, share, equal)
    counts = fit_counts([d for _, d, _, _ in rows], given_limits)
    for count, n, low in zip(counts, given_limits.units, given_limits.least, strict=True):
        assert low <= count <= n
    left = given_limits.budget - given_limits.cost(counts)
    if equal:
        assert left == 0
        return
    slack = 1e-6 * given_limits.budget
    assert left >= -slack
    open_ = [
        c for c, k, n in zip(given_limits.costs, counts, given_limits.units, strict=True) if k < n
    ]
    assert not open_ or left < min(open_) + slack


@given(rows=layers, share=st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_all_logits_move_by_one_number(rows, share: float) -> None:
    given_limits = limits(
        [(n, min(max(d, 1e-3), 1 - 1e-3), c, 0.0) for n, d, c, _ in rows], share, False
    )
    densities = [min(max(d, 1e-3), 1 - 1e-3) for _, d, _, _ in rows]
    moved = shift_to(densities, given_limits)
    shifts = [
        logit(after) - logit(before)
        for before, after, n in zip(densities, moved, given_limits.units, strict=True)
        if 1 / n < after < 1
    ]
    assert all(s == pytest.approx(shifts[0], abs=1e-6) for s in shifts)


def test_densities_that_fit_stay() -> None:
    given_limits = LayerBounds(["a", "b"], [100, 300], [1.0, 1.0], [1, 1], [100, 300], 100)
    assert fit_counts([0.25, 0.25], given_limits) == [25, 75]
    assert fit_counts([1.0, 0.0], given_limits) == [99, 1]
    assert fit_counts([0.4, 0.2], given_limits) == [40, 60]


def test_impossible_budgets_say_what_is_possible() -> None:
    with pytest.raises(BudgetError, match=r"2 of 10, .* smallest reachable density is 0.5"):
        LayerBounds(["a", "b"], [5, 5], [1.0, 1.0], [4, 1], [5, 5], 2)


def test_the_logistic_function_has_an_inverse_with_ends() -> None:
    for d in (0.0, 1e-9, 0.3, 0.5, 1 - 1e-9, 1.0):
        assert logistic(logit(d)) == pytest.approx(d, abs=1e-12)
