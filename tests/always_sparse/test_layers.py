"""Always-sparse layers take the place of dense ones, and compute the same."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spartan import kernels
from spartan.always_sparse import SparseConv2d, SparseLayer, SparseLinear, convert
from spartan.always_sparse.product import product
from spartan.errors import BudgetError, StateError
from spartan.kernels.connections import Connections
from tests.conftest import ROOT, assert_rounded
from tests.kernels.test_products import SETS

pytestmark = pytest.mark.filterwarnings("ignore:.*have no connection")

each_backend = pytest.mark.parametrize("name", ["torch", SETS[-1]])


def compare(layer: SparseLayer, x: Tensor) -> None:
    """Compare outputs and all gradients with those of the dense layer, computed in float64."""
    twin = layer.to_dense()
    exact, sums = copy.deepcopy(twin).double(), copy.deepcopy(twin).double()
    for parameter in sums.parameters():
        parameter.data.abs_()
    a = x.clone().requires_grad_()
    found = layer(a)
    gradient = torch.randn(found.shape).to(x.dtype)
    found.backward(gradient)
    pairs = layer.connections.keys()
    results = []
    for net, sign in ((exact, torch.Tensor.clone), (sums, torch.abs)):
        b = sign(x.double()).requires_grad_()
        y = net(b)
        y.backward(sign(gradient.double()))
        results.append((y.detach(), b.grad, net.weight.grad.flatten()[pairs], net.bias.grad))
    ours = found.detach(), a.grad, layer.values.grad, layer.bias.grad
    terms = gradient.numel() + twin.weight[0].numel() + 1  # no sum has more products
    for own, wanted, size in zip(ours, *results, strict=True):
        assert own.dtype == x.dtype
        assert_rounded(own, wanted, size, terms)


@each_backend
@pytest.mark.parametrize(
    "shape", [(30,), (1, 30), (5, 30), (0, 30), (300, 30), (2, 7, 30)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_like_dense(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = SparseLinear(30, 20, density=0.2, dtype=dtype)
    with kernels.using(name):
        compare(layer, torch.randn(shape, dtype=dtype))


def test_linear_takes_any_memory_order() -> None:
    layer = SparseLinear(30, 20, density=0.2, dtype=torch.float64)
    wide = torch.randn(14, 60, dtype=torch.float64)
    for x in (wide[:, :30].t().contiguous().t(), wide[::2, ::2], wide[0, :30].expand(5, 30)):
        torch.testing.assert_close(layer(x), layer.to_dense()(x))


@each_backend
@pytest.mark.parametrize("size", [(3, 4, 9, 9), (2, 4, 40, 24), (4, 9, 9)], ids=str)
@pytest.mark.parametrize("kernel", [1, 3, (1, 3)])
@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2, "padding": 1}, {"padding": (2, 3), "dilation": 2}], ids=str
)
def test_convolution_like_dense(name: str, size: Any, kernel: Any, settings: Any) -> None:
    layer = SparseConv2d(4, 6, kernel, density=0.3, **settings)
    with kernels.using(name):
        compare(layer, torch.randn(size))


def test_gradcheck() -> None:
    layer = SparseLinear(6, 5, density=0.3, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    values, bias, graph = layer.values, layer.bias, layer.connections
    assert torch.autograd.gradcheck(lambda *t: product(*t, graph), (x, values, bias))


def test_samples_are_neighbours_between_layers_and_rows_are_kept_elsewhere() -> None:
    first, second = SparseLinear(30, 20, density=0.2), SparseLinear(20, 10, density=0.2)
    x = torch.randn(8, 30, requires_grad=True)
    hidden = torch.relu(first(x))
    assert hidden.stride() == (1, 8)
    strides = []
    hidden.register_hook(lambda gradient: strides.append(gradient.stride()))
    second(hidden).sum().backward()
    assert strides == [(1, 8)]
    assert first(torch.randn(2, 4, 30)).is_contiguous()


def test_twice_in_a_graph_and_accumulated() -> None:
    layer = SparseLinear(12, 12, density=0.3, dtype=torch.float64)
    twin = layer.to_dense()
    for _ in range(2):
        x = torch.randn(5, 12, dtype=torch.float64)
        layer(torch.relu(layer(x))).square().sum().backward()
        twin(torch.relu(twin(x))).square().sum().backward()
    dense = twin.weight.grad.flatten()[layer.connections.keys()]
    torch.testing.assert_close(layer.values.grad, dense)


def test_frozen_parts_get_no_gradient() -> None:
    layer = SparseLinear(12, 12, density=0.3, dtype=torch.float64)
    layer.values.requires_grad_(False)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert layer.values.grad is None
    torch.testing.assert_close(x.grad, layer.to_dense().weight.sum(0).expand(5, 12))


def test_autocast_computes_wide() -> None:
    net = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), SparseLinear(12, 4, density=0.5))
    x = torch.randn(5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        assert y.dtype == torch.float32
        y.sum().backward()
    torch.testing.assert_close(y, net(x), rtol=0.05, atol=0.05)
    with pytest.raises(RuntimeError, match="must agree"):
        net[2](x.bfloat16())


def test_compiled() -> None:
    net = nn.Sequential(
        SparseLinear(12, 12, density=0.3), nn.ReLU(), SparseLinear(12, 4, density=1)
    )
    x = torch.randn(5, 12)
    wanted = net(x)
    wanted.sum().backward()
    gradient = net[0].values.grad.clone()
    net.zero_grad()
    found = torch.compile(net, backend="aot_eager")(x)
    found.sum().backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(net[0].values.grad, gradient)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_trains_like_a_masked_dense_layer(momentum: float) -> None:
    layer = SparseLinear(20, 20, density=0.2)
    twin = layer.to_dense()
    mask = twin.weight.detach() != 0
    settings = {"lr": 0.05, "momentum": momentum, "weight_decay": 1e-3}
    ours = torch.optim.SGD(layer.parameters(), **settings)
    theirs = torch.optim.SGD(twin.parameters(), **settings)
    for step in range(100):
        x = torch.randn(16, 20, generator=torch.Generator().manual_seed(step))
        for net, optimizer in ((layer, ours), (twin, theirs)):
            optimizer.zero_grad()
            (net(x) - x.roll(1, 1)).square().mean().backward()
            if net is twin:
                twin.weight.grad *= mask
            optimizer.step()
    torch.testing.assert_close(layer.to_dense().weight, twin.weight, rtol=1e-4, atol=1e-6)


# Graphs ------------------------------------------------------------------------------------------


def test_exact_counts_and_initialisation() -> None:
    layer = SparseLinear(400, 300, density=0.05)
    assert layer.values.numel() == 6000
    fan_in = layer.connections.fan_in
    assert int(fan_in.sum()) == 6000
    bound = (3 / fan_in.clamp(min=1)).sqrt()
    rows = layer.connections.rows()
    assert bool((layer.values.abs() <= bound[rows]).all())
    with torch.no_grad():
        variance = float(layer(torch.randn(2000, 400)).var())
    assert variance == pytest.approx(1 + 1 / 20, rel=0.2)
    # Degrees of a random graph: binomial.
    assert float(fan_in.float().var()) == pytest.approx(20 * 0.95, rel=0.35)
    assert SparseLinear(400, 300, connections_per_unit=7).values.numel() == 2100
    # Decimals as they are written, as a budget takes them: 57.5, not 57.49…; halves go to even.
    assert SparseLinear(10, 10, density=0.285).values.numel() == 28
    assert SparseLinear(10, 10, density=0.575).values.numel() == 58
    assert SparseLinear(100, 10, connections_per_unit=0.35).values.numel() == 4
    assert "connections=6,000" in repr(layer)


def test_units_without_connection_are_told_or_given_one() -> None:
    with pytest.warns(UserWarning, match=r"of 50 output units have no connection"):
        SparseLinear(100, 50, density=0.01)
    layer = SparseLinear(100, 50, density=0.01, every_unit=True)
    assert bool((layer.connections.fan_in == 1).all())
    layer = SparseLinear(100, 50, density=0.03, every_unit=True)
    assert layer.values.numel() == 150
    assert int(layer.connections.fan_in.min()) >= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Give one of"),
        ({"density": 0.1, "connections_per_unit": 3}, "Give one of"),
        ({"density": 0.0}, "more than 0 and at most 1"),
        ({"density": 1.5}, "more than 0 and at most 1"),
        ({"density": float("nan")}, "more than 0"),
        ({"connections_per_unit": 11}, "at most 10 inputs"),
        ({"density": 0.001}, "at least 1"),
        ({"density": 0.05, "every_unit": True}, "a density of 0.1"),
        ({"connections": Connections.from_keys(torch.arange(3), 2, 2)}, "2 inputs and 2 outputs"),
    ],
)
def test_graphs_that_do_not_exist(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        SparseLinear(10, 10, **settings)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(RuntimeError, match="in_features=10"):
        SparseLinear(10, 5, density=0.5)(torch.randn(3, 9))
    with pytest.raises(RuntimeError, match="in_channels=4"):
        SparseConv2d(4, 5, 3, density=0.5)(torch.randn(3, 5, 8, 8))


# Saving ------------------------------------------------------------------------------------------


def net(density: float = 0.2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 12), SparseLinear(12, 8, density=density))


def test_state_through_safetensors_into_another_graph(tmp_path: Path) -> None:
    model, other = net(), net(density=0.5)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    loss = other(torch.randn(3, 10)).sum()  # its graph still knows the old number of values
    loss.backward()
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    state = load_file(tmp_path / "state.safetensors")
    assert set(state) == {
        "0.weight", "0.bias", "1.values", "1.row_starts", "1.columns", "1.bias",
    }  # fmt: skip
    assert state["1.columns"].dtype == torch.int32
    values = other[1].values
    other.load_state_dict(state)
    assert other[1].values is values
    x = torch.randn(4, 10)
    assert torch.equal(model(x), other(x))
    optimizer.zero_grad()
    other(x).sum().backward()
    optimizer.step()
    assert loss.grad_fn is not None


def damaged() -> list[Any]:
    def swap(state: dict[str, Tensor]) -> None:
        state["1.columns"] = state["1.columns"].flip(0).contiguous()

    def cut(state: dict[str, Tensor]) -> None:
        state["1.values"] = state["1.values"][:-1].clone()

    def overflow(state: dict[str, Tensor]) -> None:
        state["1.columns"] = state["1.columns"] + 7

    def wrong_rows(state: dict[str, Tensor]) -> None:
        state["1.row_starts"] = state["1.row_starts"][1:].clone()

    return [swap, cut, overflow, wrong_rows]


@pytest.mark.parametrize("harm", damaged(), ids=lambda f: f.__name__)
def test_damaged_states_change_nothing(harm: Any) -> None:
    model = convert(nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 8)), 0.4, include="1.weight")
    before = copy.deepcopy(model.state_dict())
    state = {k: v + 1 if v.is_floating_point() else v.clone() for k, v in before.items()}
    harm(state)
    with pytest.raises(StateError, match="'1'.*not loaded"):
        model.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_copies_and_pickles() -> None:
    model = net()
    x = torch.randn(3, 10)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (twin, loaded, copy.deepcopy(model).double().float()):
        assert torch.equal(other(x), model(x))
    with torch.no_grad():
        twin[1].columns.copy_(twin[1].connections.columns.sort().values * 0)
    with pytest.raises(kernels.connections.KernelError, match="not rising"):
        twin(x)


SCRIPT = """
import resource, torch
import spartan
from spartan.always_sparse import SparseLinear
from spartan.methods import GSE

torch.set_num_threads(1)
n, batch = 65_536, 4
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of importing torch
layer = SparseLinear(n, n, bias=False, connections_per_unit=10)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
budget = spartan.Budget(density=layer.density)
sparsifier = spartan.Sparsifier(layer, optimizer, GSE(period=1, end=1.0), budget, 4)
before = sparsifier.selected()
for _ in range(2):
    optimizer.zero_grad()
    layer(torch.randn(batch, n)).square().mean().backward()
    optimizer.step()
assert sparsifier.churn(before) > 0.1
assert layer.values.numel() == 655_360
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux counts it")
def test_a_layer_whose_dense_weight_has_16_gigabytes_trains_in_two() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.5 * 1024 * 1024  # kilobytes
