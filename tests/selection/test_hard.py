"""Exact hard selection: counts, ties, order, costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spartan import hard_topk, kernels
from spartan.errors import BudgetError
from spartan.kernels import Scores, masks_of
from spartan.selection.hard import find_cutoff, select_rows

floats = st.floats(allow_nan=False, allow_infinity=False, width=32)
# Few distinct values, zeros of both signs and denormals: ties are the hard part.
tied = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-40, -1e-40, 3.4e38])


def reference(values: list[float], budget: int) -> list[bool]:
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return [i in set(order[:budget]) for i in range(len(values))]


@settings(deadline=None, max_examples=200)
@given(st.lists(floats | tied, min_size=1, max_size=60), st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_largest_and_breaks_ties_by_position(
    dtype: torch.dtype, values: list[float], data: st.DataObject
) -> None:
    budget = data.draw(st.integers(0, len(values)))
    mask = hard_topk(torch.tensor(values, dtype=dtype), budget)
    assert mask.tolist() == reference(values, budget)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(floats | tied, max_size=20), min_size=1, max_size=6), st.data())
def test_many_tensors_select_as_their_concatenation(
    parts: list[list[float]], data: st.DataObject
) -> None:
    tensors = [torch.tensor(p, dtype=torch.float32) for p in parts if p]
    if not tensors:
        return
    whole = torch.cat(tensors)
    budget = data.draw(st.integers(0, len(whole)))
    ones = [1.0] * len(tensors)
    scores = Scores(tensors, ones, ones, absolute=False)
    together = torch.cat(masks_of(scores, find_cutoff(scores, budget)))
    assert torch.equal(together, hard_topk(whole, budget))


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(tied | floats, st.sampled_from([0.1, 0.3, 1.0, 2.5])), min_size=1,
             max_size=30),
    st.floats(0, 1),
)  # fmt: skip
def test_costs_give_the_largest_greedy_prefix(
    items: list[tuple[float, float]], fraction: float
) -> None:
    values = torch.tensor([v / 1e3 for v, _ in items], dtype=torch.float64)
    costs = torch.tensor([c for _, c in items], dtype=torch.float64)
    budget = fraction * float(costs.sum())
    mask = hard_topk(values, budget, costs)
    unit = (values / costs + 0.0).tolist()
    expected, spent = [False] * len(items), 0.0
    for i in sorted(range(len(items)), key=lambda i: (-unit[i], i)):
        if spent + float(costs[i]) > budget * (1 + 1e-9):
            break
        expected[i], spent = True, spent + float(costs[i])
    # Sums of tenths sit on the edge of the budget; within rounding both answers are right.
    if abs(spent - budget) > 1e-9:
        assert float(costs[mask].sum()) <= budget * (1 + 1e-9)
        assert mask.tolist() == expected


def test_vectors(vectors: dict[str, Any]) -> None:
    for case in vectors["soft_topk"]:
        values = torch.tensor(case["values"], dtype=torch.float64)
        costs = torch.tensor(case["costs"], dtype=torch.float64)
        mask = hard_topk(values, case["budget"], costs)
        assert mask.int().tolist() == case["hard_topk_within_budget"], case["name"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_count_is_exact_where_everything_ties(dtype: torch.dtype) -> None:
    values = torch.full((1000, 1000), 0.01, dtype=dtype)
    mask = hard_topk(values, 123_456)
    assert int(mask.sum()) == 123_456
    assert bool(mask.flatten()[:123_456].all())


@pytest.mark.parametrize("n", [1, 2, 4095, 4097, 300_000])
def test_agrees_with_torch_topk_on_distinct_values(n: int) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    for budget in {0, 1, n // 3, n - 1, n}:
        expected = torch.zeros(n, dtype=torch.bool)
        expected[values.topk(budget).indices] = True
        assert torch.equal(hard_topk(values, budget), expected)


def test_threshold_is_the_smallest_kept_score() -> None:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    scores = Scores([values], [1.0], [1.0], absolute=False)
    assert find_cutoff(scores, 100).threshold == values.topk(100).values.min().item()
    assert find_cutoff(scores, 1000).threshold == -math.inf


def test_rows_keep_n_of_every_m_with_ties() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 2.0, 3.0]])
    assert select_rows(scores, 2).tolist() == [
        [True, True, False, False],
        [False, True, False, True],
    ]


@pytest.mark.parametrize(
    ("values", "budget", "costs", "message"),
    [
        (torch.tensor([1.0, math.nan]), 1, None, "NaN or infinity"),
        (torch.tensor([1.0, 2.0]), 3, None, "between 0 and the total cost 2"),
        (torch.tensor([1.0, 2.0]), -1, None, "between 0"),
        (torch.tensor([1, 2]), 1, None, "floating-point"),
        (torch.tensor([1.0, 2.0]), 1, torch.tensor([1.0, 0.0]), "positive"),
        (torch.tensor([1.0, 2.0]), 1, torch.tensor([1.0]), "must agree"),
    ],
)
def test_bad_requests_are_refused(
    values: Tensor, budget: float, costs: Tensor | None, message: str
) -> None:
    with pytest.raises(BudgetError, match=message):
        hard_topk(values, budget, costs)


def test_ties_in_tensors_that_are_not_contiguous() -> None:
    for values in (
        torch.ones(3, 4).t(),
        torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ):
        mask = hard_topk(values, 5)
        assert mask.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("backend", ["torch", kernels.backend().name])
def test_costs_use_a_budget_up_exactly(backend: str) -> None:
    """Where the greedy prefix meets the budget to the last unit, none is lost to rounding."""
    met = 0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(60_000, generator=generator) for _ in range(2)]
        scores = Scores(tensors, [1.0, 0.5], [0.1, 0.2], absolute=True)
        every = torch.cat([scores.of(x, i) for i, x in enumerate(tensors)])
        tenths = torch.tensor([1, 2]).repeat_interleave(60_000)
        order = every.sort(descending=True, stable=True).indices
        spent = tenths[order].cumsum(0)
        budget = 45_000
        count = int((spent <= budget).sum())
        met += int(spent[count - 1]) == budget
        expected = torch.zeros(120_000, dtype=torch.bool)
        expected[order[:count]] = True
        with kernels.using(backend):
            masks = masks_of(scores, find_cutoff(scores, 0.1 * budget))
        assert torch.equal(torch.cat(masks), expected)
    assert met
