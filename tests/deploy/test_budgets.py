"""Budgets in bytes of the packed file, and in milliseconds on this machine."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import spartan
from spartan import NM, Block, Budget, Sparsifier
from spartan.deploy.plan import Plan
from spartan.deploy.timing import Timing, time_side_by_side
from spartan.errors import BudgetError, StateError
from spartan.methods import Magnitude
from spartan.weights.patterns import Pattern, Unstructured
from tests.conftest import examples

pytestmark = pytest.mark.filterwarnings("ignore:Nothing is kept")


def pruned(model: nn.Module, budget: Budget, pattern: Pattern | None = None) -> Sparsifier:
    """Prune in one step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = Magnitude(schedule="one-shot", begin=0.0)
    sparsifier = Sparsifier(
        model, optimizer, method=method, budget=budget, pattern=pattern, total_steps=1
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return sparsifier


@settings(deadline=None, max_examples=examples(40))
@given(st.floats(0.04, 1.0), st.sampled_from(["global", "uniform"]),
       st.sampled_from([Unstructured(), Block(4, 4), Block(16, 1)]),
       st.sampled_from([torch.float32, torch.bfloat16]))  # fmt: skip
def test_packed_bytes_keep_the_budget(
    density: float, allocation: str, pattern: Pattern, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128, dtype=dtype), nn.Conv2d(32, 64, 3, dtype=dtype))
    budget = Budget(density=density, cost="bytes", allocation=allocation)
    try:
        pruned(model, budget, pattern).finalize()
    except BudgetError as error:
        assert density < 0.1, error  # noqa: PT017
        return
    with tempfile.TemporaryDirectory() as folder:
        stored = spartan.save(model, Path(folder) / "x.safetensors")
    weights = [s for s in stored if s.name.endswith("weight")]
    overhead = sum(8 * 4 for _ in weights)  # the shapes
    dense = sum(s.dense_bytes for s in weights)
    taken = sum(s.bytes for s in weights) - overhead
    assert taken <= density * dense
    if isinstance(pattern, Unstructured) and allocation == "uniform" and density < 0.9:
        # And most of it is used, but for what a bitmask takes of it.
        assert taken >= 0.75 * (density * dense - dense / 32)


def test_bytes_that_cannot_be() -> None:
    model = nn.Linear(64, 64)
    with pytest.raises(BudgetError, match="no room"):
        pruned(model, Budget(density=0.001, cost="bytes"))
    with pytest.raises(BudgetError, match="N:M"):
        pruned(model, Budget(density=0.5, cost="bytes"), NM(2, 4))


def test_what_does_not_go_with_latency() -> None:
    x = torch.randn(1, 8)
    for wrong in (
        {"density": 0.1}, {"cost": "flops"}, {"allocation": "erk"}, {"count": "all"},
    ):  # fmt: skip
        with pytest.raises(BudgetError, match="of its own"):
            Budget(latency_ms=1.0, example_input=x, **wrong)
    with pytest.raises(BudgetError, match="positive"):
        Budget(latency_ms=-1.0, example_input=x)
    with pytest.raises(BudgetError, match="example_input"):
        Budget(latency_ms=1.0)
    with pytest.raises(BudgetError, match="density"):
        pruned(nn.Linear(8, 8), Budget(latency_ms=1.0, example_input=x), NM(2, 4))


@pytest.fixture
def a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose sparse layers take 1 ms and 250 ns a weight, and whose dense ones 9 ms."""

    def measure(model: nn.Module, weights: Any, masks: Any, example: Any) -> Plan:
        from spartan.deploy.plan import LayerPlan

        def taking(seconds: float) -> Timing:
            return Timing(seconds, seconds, seconds, 5)

        layers = []
        for i, (w, mask) in enumerate(zip(weights, masks, strict=True)):
            seconds = 1e-3 + (1 + i) * 25e-8 * int(mask.sum())
            density = float(mask.float().mean())
            facts = (w.name.rpartition(".")[0], tuple(w.shape), density, "unstructured", "rows")
            layers.append(LayerPlan(*facts, taking(9e-3), taking(min(seconds, 9e-3))))
        total = sum(layer.sparse.median for layer in layers if layer.sparse)
        return Plan(layers, taking(9e-3 * len(layers)), taking(total), 1, "", True)

    monkeypatch.setattr("spartan.deploy.latency._measure", measure)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 120), nn.Linear(120, 100))


def time_of(model: nn.Module) -> float:
    """Milliseconds on that machine."""
    counts = [int((model[i].weight != 0).sum()) for i in range(2)]
    return sum(1 + (1 + i) * 25e-5 * n for i, n in enumerate(counts))


@pytest.mark.usefixtures("a_machine")
@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("wanted", [2.5, 4.0, 7.0])
def test_the_time_is_met(wanted: float, allocation: str) -> None:
    model = network()
    x = torch.randn(1, 100)
    sparsifier = pruned(model, Budget(latency_ms=wanted, example_input=x, allocation=allocation))
    assert abs(time_of(model) - wanted) <= 0.1 * wanted
    densities = [layer.kept_units / layer.units for layer in sparsifier.layers()]
    if allocation == "uniform":
        assert abs(densities[0] - densities[1]) < 1e-3
    else:  # a weight of the second layer costs twice as much
        assert densities[0] > 1.2 * densities[1]


@pytest.mark.usefixtures("a_machine")
def test_times_that_cannot_be() -> None:
    x = torch.randn(1, 100)
    with pytest.raises(BudgetError, match="already takes 18"):
        pruned(network(), Budget(latency_ms=20.0, example_input=x))
    with pytest.raises(BudgetError, match="cannot be reached"):
        pruned(network(), Budget(latency_ms=1.0, example_input=x))


@pytest.mark.usefixtures("a_machine")
def test_times_too_noisy_to_tell_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spartan.deploy.latency._slope", lambda table: -1e-9)
    x = torch.randn(1, 100)
    with pytest.raises(BudgetError, match="no slower with more weights"):
        pruned(network(), Budget(latency_ms=4.0, example_input=x))
    with pytest.raises(BudgetError, match="already takes 18"):
        pruned(network(), Budget(latency_ms=20.0, example_input=x))


@pytest.mark.usefixtures("a_machine")
def test_a_resumed_run_keeps_the_budget_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    x, wanted = torch.randn(1, 100), 4.0
    first = pruned(network(), Budget(latency_ms=wanted, example_input=x))
    state = copy.deepcopy(first.state_dict())

    other = network()
    monkeypatch.setattr(
        "spartan.deploy.latency.seconds_per_weight", lambda *args: [3e-8, 1e-8]
    )  # measured on a busier day
    second = pruned(other, Budget(latency_ms=wanted, example_input=x))
    assert second.run.groups[0].budget != first.run.groups[0].budget
    second.load_state_dict(state)
    assert second.run.groups[0].budget == first.run.groups[0].budget
    for a, b in zip(first.weights, second.weights, strict=True):
        assert torch.equal(a.mask, b.mask)
        assert (a.cost, a.divisor) == pytest.approx((b.cost, b.divisor))

    state["settings"]["budgets"] = [[1.0]]
    with pytest.raises(StateError, match="measured budgets"):
        second.load_state_dict(state)
    third = pruned(network(), Budget(latency_ms=5.0, example_input=x))
    with pytest.raises(StateError, match="latency_ms"):
        third.load_state_dict(first.state_dict())


def test_latency_is_measured_on_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "spartan.deploy.accelerating.time_side_by_side",
        lambda calls, seconds: time_side_by_side(calls, min(seconds, 0.02)),
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    x = torch.randn(1, 1024)
    dense = spartan.accelerate(model, x, seconds=0.02, verbose=False).plan.dense.median * 1e3
    try:
        sparsifier = pruned(model, Budget(latency_ms=0.6 * dense, example_input=x))
    except BudgetError as error:  # without native kernels, or on a very busy machine
        pytest.skip(f"no sparse kernel wins here: {error}")
    assert 0.002 < sparsifier.density < 0.9
