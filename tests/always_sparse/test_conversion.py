"""Dense layers become sparse ones with exact counts, and dense again."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import spartan
from spartan import Budget, Sparsifier
from spartan.always_sparse import (
    SparseConv2d,
    SparseLinear,
    convert,
    density,
    sparse_layers,
    to_dense,
)
from spartan.always_sparse.conversion import dense_state
from spartan.always_sparse.random_graphs import distinct, nth_outside, random_connections
from spartan.errors import BudgetError, MethodError, PrunableError, StateError
from spartan.methods import GSE, Spartan
from tests.conftest import Net

pytestmark = pytest.mark.filterwarnings("ignore:.*have no connection")


def counts(model: nn.Module) -> dict[str, int]:
    return {name: layer.values.numel() for name, layer in sparse_layers(model).items()}


@pytest.mark.parametrize("allocation", ["er", "erk", "uniform"])
@pytest.mark.parametrize("asked", [0.5, 0.1, 0.05])
def test_exact_counts(allocation: str, asked: float) -> None:
    model = convert(Net(), asked, allocation)
    total = 8 * 4 * 9 + 128 * 16 + 16 * 8
    if allocation == "uniform":
        assert counts(model) == {
            "conv": round(asked * 288), "fc1": round(asked * 2048), "fc2": round(asked * 128)
        }  # fmt: skip
    else:
        assert sum(counts(model).values()) == round(asked * total)
        assert density(model) == round(asked * total) / total
    assert isinstance(model.conv, SparseConv2d)
    assert isinstance(model.fc1, SparseLinear)
    model(torch.randn(2, 4, 4, 4)).sum().backward()


def test_er_gives_the_excess_of_saturated_layers_to_the_others() -> None:
    # The last layer would have a density above 1: (64 + 2) / (64 * 2) times the same factor.
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    convert(model, 0.3)
    total = 2 * 64 * 64 + 64 * 2
    assert counts(model)["2"] == 128
    assert sum(counts(model).values()) == round(0.3 * total)
    assert abs(counts(model)["0"] - counts(model)["1"]) <= 1


def test_mapping_include_and_exclude() -> None:
    model = convert(Net(), None, {"fc1": 0.1, "fc2.weight": 0.5}, include=["fc1", "fc2"])
    assert counts(model) == {"fc1": 205, "fc2": 64}
    assert isinstance(model.conv, nn.Conv2d)
    model = convert(Net(), 0.2, exclude="fc2")
    assert set(counts(model)) == {"conv", "fc1"}


def test_back_to_dense_and_what_stays() -> None:
    model = Net().eval()
    model.fc1.weight.requires_grad_(False)
    bias = model.fc1.bias
    names = list(model.state_dict())
    convert(model, 0.3)
    assert model.fc1.bias is bias
    assert not model.fc1.values.requires_grad
    assert not model.fc1.training
    x = torch.randn(2, 4, 4, 4)
    wanted = model(x)
    shapes = {f"{n}.weight": m.weight_shape for n, m in sparse_layers(model).items()}
    state = dense_state(model.state_dict(), shapes)
    kept = counts(model)
    to_dense(model)
    assert type(model.fc1) is nn.Linear
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), wanted)
    assert {n: int(model.get_submodule(n).weight.count_nonzero()) for n in kept} == kept
    assert set(state) == set(names)
    assert all(torch.equal(state[name], model.state_dict()[name]) for name in names)


def test_single_layers_are_returned() -> None:
    layer = convert(nn.Linear(10, 10), 0.5)
    assert isinstance(layer, SparseLinear)
    assert isinstance(to_dense(layer), nn.Linear)


def test_shared_layers_stay_shared_and_tied_weights_are_refused() -> None:
    shared = nn.Linear(10, 10)
    model = convert(nn.Sequential(shared, nn.ReLU(), shared), 0.5)
    assert model[0] is model[2]
    tied = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    tied[1].weight = tied[0].weight
    with pytest.raises(PrunableError, match="tied"):
        convert(tied, 0.5)


def test_transformers_convert_what_is_a_layer() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    with pytest.warns(UserWarning, match=r"self_attn.in_proj_weight.* stay dense"):
        model = convert(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 0.3)
    assert set(counts(model)) == {
        f"layers.{i}.linear{k}" for i in range(2) for k in (1, 2)
    }  # fmt: skip
    x = torch.randn(2, 5, 16)
    with torch.no_grad():  # where torch would take its fused path
        assert model.eval()(x).shape == x.shape


def test_what_cannot_be_converted() -> None:
    with pytest.raises(BudgetError, match="layer by layer"):
        convert(Net(), 0.1, "global")
    with pytest.raises(BudgetError, match="Give a density"):
        convert(Net())
    with pytest.raises(BudgetError, match="keeps nothing"):
        convert(Net(), 0.0001)
    with pytest.raises(BudgetError, match="10 connections for 16 output units"):
        convert(Net(), 0.005, "uniform", every_unit=True, include="fc1")
    with pytest.raises(PrunableError, match="No parameter is named"):
        convert(Net(), 0.1, include="nope")
    with pytest.raises(PrunableError, match="Nothing to convert"):
        convert(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), 0.1)
    with pytest.raises(PrunableError, match="meta device"):
        convert(nn.Linear(10, 10, device="meta"), 0.1)
    with pytest.raises(PrunableError, match="no always-sparse layer"):
        density(Net())
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(BudgetError):
        convert(model, 0.0001)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_optimizers_made_before_are_refused() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert(model, 0.1)
    with pytest.raises(StateError, match="made after"):
        Sparsifier(model, optimizer, GSE(), Budget(density=0.1), 10)


def test_methods_and_models_must_fit() -> None:
    dense, sparse = Net(), convert(Net(), 0.1)
    with pytest.raises(PrunableError, match="convert"):
        Sparsifier(dense, None, GSE(), Budget(density=0.1), 10)
    with pytest.raises(MethodError, match="to_dense"):
        Sparsifier(sparse, None, Spartan(), Budget(density=0.1), 10)


# Random graphs -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.data(), st.integers(0, 9))
def test_distinct_numbers(population: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(0, population))
    drawn = distinct(count, population, torch.Generator().manual_seed(seed))
    assert drawn.numel() == count
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert all(0 <= x < population for x in drawn.tolist())


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 60)))
def test_nth_number_outside_of_a_set(taken: set[int]) -> None:
    outside = [x for x in range(100) if x not in taken]
    found = nth_outside(torch.tensor(sorted(taken), dtype=torch.int64), torch.arange(len(outside)))
    assert found.tolist() == outside


def test_each_pair_is_as_likely() -> None:
    torch.manual_seed(0)
    draws = 4000
    hits = torch.zeros(24)
    for _ in range(draws):
        hits[random_connections(4, 6, 5, every_unit=False).keys()] += 1
    expected = draws * 5 / 24
    # Chi-square of 24 cells, whose counts vary less than Poisson's: 0.999 quantile of 23 degrees.
    assert float(((hits - expected).square() / expected).sum()) < 49.7


def test_wide_graphs_need_no_square_memory() -> None:
    graph = random_connections(1 << 20, 1 << 20, 1000, every_unit=False)
    assert graph.count == 1000
    assert graph.pairs == 1 << 40


def test_no_warning_where_every_unit_is_connected() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = convert(Net(), 0.1, every_unit=True)
    assert all(int(layer.connections.fan_in.min()) >= 1 for layer in sparse_layers(model).values())


def test_accelerated_and_purged_like_any_sparse_model() -> None:
    model = convert(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), 0.1)
    x = torch.randn(4, 64)
    fast = spartan.accelerate(model, x, seconds=0.001, verbose=False)
    assert not sparse_layers(fast)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(spartan.purge(model)(x), model(x), rtol=1e-4, atol=1e-5)
    assert sparse_layers(model)
