"""Exact selection with a floor for every tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spartan import Block, Budget, Channel, Sparsifier, Unstructured
from spartan.budgets.group_budget import GroupBudget, with_floors
from spartan.errors import BudgetError
from spartan.kernels import ScanRequest, Scores, masks_of, scan
from spartan.methods import DualAveraging
from spartan.selection.hard import find_cutoff, held_to_floors
from spartan.weights.prunable import find_prunable
from tests.conftest import examples

values = st.sampled_from([0.0, 1.0, 2.0, 1e-6]) | st.floats(0, 100, width=32)
parts = st.lists(st.lists(values, min_size=1, max_size=15), min_size=1, max_size=6)


def best_sum(tensors: list[Tensor], budget: int, floors: list[int]) -> Tensor:
    """The largest of every tensor first, as many as its floor, then the largest of all others."""
    ordered = [x.sort(descending=True).values for x in tensors]
    first = torch.cat([x[:floor] for x, floor in zip(ordered, floors, strict=True)])
    rest = torch.cat([x[floor:] for x, floor in zip(ordered, floors, strict=True)])
    return first.sum() + rest.sort(descending=True).values[: budget - len(first)].sum()


@settings(deadline=None, max_examples=examples(200))
@given(parts, st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_tensor_keeps_its_floor_and_all_keep_the_most(
    dtype: torch.dtype, parts: list[list[float]], data: st.DataObject
) -> None:
    tensors = [torch.tensor(part, dtype=dtype) for part in parts]
    floors = [data.draw(st.integers(0, len(part))) for part in parts]
    budget = data.draw(st.integers(sum(floors), sum(map(len, parts))))
    ones = [1.0] * len(tensors)
    scores = Scores(tensors, ones, ones, absolute=False)
    masks = masks_of(scores, find_cutoff(scores, budget, floors))
    counts = [int(mask.sum()) for mask in masks]
    assert sum(counts) == budget
    assert all(count >= floor for count, floor in zip(counts, floors, strict=True))
    kept = sum((x[mask].sum() for x, mask in zip(tensors, masks, strict=True)), torch.zeros(()))
    torch.testing.assert_close(kept.to(dtype), best_sum(tensors, budget, floors))


def test_counts_of_a_scan_do_not_depend_on_where_it_looked_first() -> None:
    torch.manual_seed(0)
    tensors = [torch.rand(n) for n in (70_000, 3, 500)]
    scores = Scores(tensors, [1.0, 0.5, 2.0], [1.0] * 3, absolute=True)
    plain = scan([ScanRequest(scores, 9000, counted=True)])[0]
    t = plain.cutoff.threshold
    for bracket in ((0.999 * t, 1.001 * t), (0.1, 0.2), (2 * t, 3 * t)):
        again = scan([ScanRequest(scores, 9000, bracket, counted=True)])[0]
        assert (again.cutoff.threshold, again.above) == (t, plain.above)
    wanted = [int((scores.of(x, i) > t).sum()) for i, x in enumerate(tensors)]
    assert plain.above == wanted


@settings(deadline=None, max_examples=examples(100))
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.data())
def test_ties_are_shared_out_exactly(sizes: list[int], data: st.DataObject) -> None:
    """All entries equal, or nearly all zero: what is kept at the threshold counts."""
    tensors = [torch.zeros(n) if data.draw(st.booleans()) else torch.ones(n) for n in sizes]
    floors = [data.draw(st.integers(0, n)) for n in sizes]
    budget = data.draw(st.integers(sum(floors), sum(sizes)))
    scores = Scores(tensors, [1.0] * len(sizes), [1.0] * len(sizes), absolute=True)
    counts = [int(m.sum()) for m in masks_of(scores, find_cutoff(scores, budget, floors))]
    assert sum(counts) == budget
    assert all(count >= floor for count, floor in zip(counts, floors, strict=True))


@pytest.mark.parametrize("method", ["spartan", "dual-averaging", "magnitude"])
def test_layers_of_equal_weights_live_too(method: str) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))).bfloat16()
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(0.125)
    rows = Sparsifier(model, None, method, 0.01, 10)
    rows.finalize()
    kept = [row.kept for row in rows.layers()]
    assert sum(kept) == round(0.01 * 6 * 64 * 64)
    assert all(row.kept >= row.floor > 0 for row in rows.layers())


def test_without_floors_nothing_changes() -> None:
    scores = Scores([torch.rand(50), torch.rand(50)], [1.0] * 2, [1.0] * 2, absolute=True)
    request = ScanRequest(scores, 10, counted=True)
    found = scan([request])[0]
    assert held_to_floors(request, found, []) is found.cutoff
    assert held_to_floors(request, found, [0, 0]) is found.cutoff


def nets(small: float) -> nn.Sequential:
    torch.manual_seed(0)
    # Rows of one length: all units of a pattern cost the same.
    model = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 20))
    with torch.no_grad():
        model[2].weight.mul_(small)
    return model


@pytest.mark.parametrize("pattern", [None, Block(2, 2), Channel()])
def test_no_layer_dies_under_a_global_budget(pattern: object) -> None:
    model = nets(1e-6)
    sparsifier = Sparsifier(model, None, DualAveraging(warmup=0.0), 0.2, 10, pattern)
    rows = sparsifier.layers()
    units = sum(row.units for row in rows)
    assert sum(row.kept_units for row in rows) == round(0.2 * units)
    assert rows[1].kept_units == rows[1].floor > 0
    sparsifier.finalize()
    assert int(model[2].weight.count_nonzero()) == sparsifier.layers()[1].kept


def test_floors_are_a_share_of_the_uniform_density_and_at_most_one_an_output() -> None:
    weights = find_prunable(nets(1.0))
    (budget,) = Budget(density=0.01).plan(nets(1.0), weights, Unstructured())
    assert budget.floors == (3, 2)  # 0.3 of 9 and of 6, rounded up
    (rich,) = Budget(density=0.9).plan(nets(1.0), weights, Unstructured())
    assert rich.floors == (30, 20)
    (free,) = Budget(density=0.9, layer_floor=0).plan(nets(1.0), weights, Unstructured())
    assert free.floors == ()


def test_where_floors_do_not_fit_they_are_one_or_none() -> None:
    weights = find_prunable(nets(1.0))
    few = with_floors(GroupBudget((0, 1), (1.0, 1.0), 1500.0, 2.0), weights, [900, 600], 1.0)
    assert few.floors == (1, 1)
    assert with_floors(GroupBudget((0, 1), (1.0, 1.0), 1500.0, 1.0), weights, [900, 600], 0.3) == (
        GroupBudget((0, 1), (1.0, 1.0), 1500.0, 1.0)
    )


def test_a_floor_is_a_fraction() -> None:
    with pytest.raises(BudgetError, match="layer_floor=2"):
        Budget(density=0.5, layer_floor=2)
