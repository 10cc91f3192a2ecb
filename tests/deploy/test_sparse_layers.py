"""A sparse layer is the dense one to all code around it, or is dense."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.nn.utils import parametrize

import spartan
from spartan.deploy.accelerating import plan_of
from spartan.deploy.inference_layers import InferenceConv2d, InferenceLayer, InferenceLinear
from spartan.deploy.weight_on_demand import WeightOnDemand
from spartan.errors import DeployError
from spartan.kernels.blocked_weights import Geometry
from tests.deploy import architectures
from tests.deploy.test_accelerate import fused, kinds, prune


@pytest.fixture(autouse=True)
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("accelerating", "choosing"):
        monkeypatch.setattr(f"spartan.deploy.{module}.time_side_by_side", architectures.sparse_wins)


def accelerate(model: nn.Module, x: Any) -> nn.Module:
    return spartan.accelerate(model, x, seconds=0.0, verbose=False)


def pruned_linear() -> nn.Linear:
    layer = nn.Linear(24, 16)
    prune(layer, 0.3)
    return layer


def notes(fast: nn.Module) -> dict[str, str]:
    """Return why layers are dense, by name."""
    return {layer.name: layer.note for layer in plan_of(fast).layers if layer.format == "dense"}


# What a layer says of itself ---------------------------------------------------------------------


def test_a_sparse_linear_has_what_the_dense_one_has() -> None:
    dense = pruned_linear()
    sparse = InferenceLinear(dense)
    assert isinstance(sparse, nn.Linear)
    assert (sparse.in_features, sparse.out_features) == (24, 16)
    assert isinstance(sparse.weight, nn.Parameter)
    facts = ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout")
    frozen = dense.requires_grad_(False)
    assert all(getattr(sparse.weight, fact) == getattr(frozen.weight, fact) for fact in facts)
    assert (sparse.weight.size(0), len(sparse.weight), sparse.weight.numel()) == (16, 16, 384)
    assert sparse.weight is sparse.weight
    assert not sparse.lent  # nothing of that made it dense
    assert next(sparse.parameters()).dtype is torch.float32
    assert torch.equal(sparse.weight, dense.weight)
    assert sparse.lent
    assert torch.equal(torch.as_tensor(sparse.weight.numpy()), dense.weight)
    assert torch.equal(sparse.bias, dense.bias)
    x = torch.randn(3, 24)
    torch.testing.assert_close(F.linear(x, sparse.weight, sparse.bias), sparse(x))
    torch.testing.assert_close(x.to(sparse.weight.dtype) @ sparse.weight.T, x @ dense.weight.T)
    for whole in (copy.deepcopy(sparse.weight), pickle.loads(pickle.dumps(sparse.weight))):
        assert torch.equal(whole, dense.weight)
    assert "in_features=24, out_features=16, bias=True, density=" in repr(sparse)


def test_a_sparse_convolution_has_what_the_dense_one_has() -> None:
    dense = nn.Conv2d(4, 6, (3, 1), stride=2, padding=1, dilation=1)
    sparse = InferenceConv2d(dense)
    assert isinstance(sparse, nn.Conv2d)
    for name in (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
        *("groups", "padding_mode", "transposed", "output_padding"),
    ):
        assert getattr(sparse, name) == getattr(dense, name)
    assert sparse.weight.shape == (6, 4, 3, 1)
    assert torch.equal(sparse.weight, dense.weight)


WRITES: dict[str, Callable[[Any, Tensor], object]] = {
    "in place": lambda layer, delta: layer.weight.add_(delta),
    "through .data": lambda layer, delta: layer.weight.data.add_(delta),
    "detached": lambda layer, delta: layer.weight.detach().add_(delta),
    "by NumPy": lambda layer, delta: layer.weight.numpy().__iadd__(delta.numpy()),
    "a slice": lambda layer, delta: layer.weight[:].add_(delta),
    "data set": lambda layer, delta: setattr(layer.weight, "data", layer.weight + delta),
    "copied into": lambda layer, delta: layer.weight.copy_(layer.weight + delta),
    "assigned": lambda layer, delta: setattr(layer, "weight", nn.Parameter(layer.weight + delta)),
    "with += as mergers do": lambda layer, delta: exec("layer.weight.data += delta"),
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.filterwarnings("ignore:The weight of a sparse layer was written")
def test_what_is_written_into_its_weight_counts(how: str) -> None:
    dense = pruned_linear()
    sparse, x, delta = InferenceLinear(dense), torch.randn(3, 24), torch.randn(16, 24)
    if how.startswith("with"):
        sparse.weight.data += delta
    else:
        with torch.no_grad():
            WRITES[how](sparse, delta)
    with torch.no_grad():
        wanted = F.linear(x, dense.weight + delta, dense.bias)
    for layer in (copy.deepcopy(sparse), sparse):
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
        assert layer.is_dense
    assert "dense again" in repr(sparse)
    assert set(sparse.state_dict()) == {"weight", "bias"}


def test_a_write_long_after_reading_counts_and_is_told() -> None:
    sparse, x = InferenceLinear(pruned_linear()), torch.randn(3, 24)
    held = sparse.weight.detach()
    with torch.no_grad():
        before = sparse(x)
        sparse(x)
        held.zero_()
        with pytest.warns(UserWarning, match="dense from now on"):
            assert torch.equal(sparse(x), sparse.bias.expand(3, 16))
    assert before.any()


def test_ties_can_be_made_and_wrong_weights_are_refused() -> None:
    sparse, table = InferenceLinear(nn.Linear(8, 20)), nn.Embedding(20, 8)
    sparse.weight = table.weight
    assert sparse.weight is table.weight
    with torch.no_grad():
        table.weight.fill_(1.0)
        assert torch.equal(sparse(torch.ones(1, 8)), sparse.bias[None] + 8)
    with pytest.raises(DeployError, match=r"\(20, 8\)"):
        sparse.weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(DeployError, match="Parameter"):
        sparse.weight = torch.ones(20, 8)


CHANGES: dict[str, Callable[[Any], object]] = {
    "bias": lambda model: model[0].bias.add_(1.0),
    "bias.data": lambda model: model[0].bias.data.add_(1.0),
    "bias.data assigned": lambda model: setattr(model[0].bias, "data", torch.ones(8)),
    "bias by NumPy": lambda model: model[0].bias.numpy().__iadd__(1.0),
    "bias exchanged": lambda model: model[0]._parameters.update(bias=nn.Parameter(torch.ones(8))),
    "mean.data": lambda model: model[1].running_mean.data.mul_(2.0),
    "norm exchanged": lambda model: setattr(model[1], "weight", nn.Parameter(torch.ones(8))),
    "all": lambda model: [p.data.mul_(1.5) for p in model.parameters()],
}


@pytest.mark.parametrize("how", CHANGES)
def test_changes_of_biases_and_norms_count_however_they_are_made(how: str) -> None:
    model = prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), 0.5)
    x = torch.randn(2, 3, 6, 6)
    fast = accelerate(model, x)
    model.requires_grad_(False)
    with torch.no_grad():
        fast(x)
        for one in (model, fast):
            CHANGES[how](one)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_biases_and_norms_that_change_count() -> None:
    model = prune(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), 0.5)
    x = torch.randn(2, 3, 6, 6)
    fast = accelerate(model, x)
    assert fused(fast)
    with torch.no_grad():
        for one in (model, fast):
            one(x)
            one[0].bias.add_(1.0)
            one[1].running_mean.mul_(2.0)
            one[1].weight.mul_(3.0)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


# What stays dense, and why -----------------------------------------------------------------------


class Reads(nn.Module):
    """Branches on what its layers say, and computes with the weight of one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x.to(self.a.weight.dtype))
        if self.b.in_features == x.shape[-1] and self.b.bias is not None:
            x = self.b(x)
        return self.c(x) + self.c.weight.norm()


def test_layers_whose_weight_is_computed_with_stay_dense_alone() -> None:
    model, x = prune(Reads(), 0.3), torch.randn(4, 16)
    fast = accelerate(model, x)
    assert notes(fast) == {"c": "the model computes with its weight itself"}
    torch.testing.assert_close(fast(x), model(x))
    assert not any(layer.lent for layer in fast.modules() if isinstance(layer, InferenceLayer))


def test_a_layer_that_the_model_refuses_stays_dense_alone() -> None:
    class Picky(Reads):
        def forward(self, x: Tensor) -> Tensor:
            if type(self.b) is not nn.Linear:
                raise TypeError("b is no Linear")
            return self.c(self.b(self.a(x)))

    model, x = prune(Picky(), 0.3), torch.randn(4, 16)
    fast = accelerate(model, x)
    assert notes(fast) == {"b": "the model fails with it: b is no Linear"}
    torch.testing.assert_close(fast(x), model(x))


class Everything(nn.Module):
    """Weights of every kind."""

    def __init__(self) -> None:
        super().__init__()

        class Own(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return 2 * super().forward(input)

        self.table, self.head = nn.Embedding(9, 16), nn.Linear(16, 9, bias=False)
        self.head.weight = self.table.weight
        self.plain, self.hooked, self.own = nn.Linear(16, 16), nn.Linear(16, 16), Own(16, 16)
        self.hooked.register_forward_hook(lambda m, x, y: y + 1)
        self.normed = parametrize_scale(nn.Linear(16, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.line, self.volume = nn.Conv1d(16, 16, 1), nn.Conv3d(1, 1, 1)
        self.grouped, self.unused = nn.Conv2d(2, 2, 1, groups=2), nn.Linear(4, 4)
        self.wide, self.scale = nn.Linear(16, 16).double(), nn.Parameter(torch.ones(2, 16))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.normed(self.own(self.hooked(self.plain(self.table(ids)))))
        x = self.attention(x, x, x)[0]
        x = self.line(x.transpose(1, 2)).transpose(1, 2) * self.scale[0]
        x = self.volume(x[:, None, None])[:, 0, 0]
        x = self.grouped(torch.stack([x, x], 1)).sum(1)
        return self.head(self.wide(x.double()).float())


def parametrize_scale(layer: nn.Module) -> nn.Module:
    class Scale(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    return parametrize.register_parametrization(layer, "weight", Scale())


def test_every_weight_is_in_the_plan_with_a_reason() -> None:
    model, ids = Everything(), torch.randint(0, 9, (2, 5))
    with torch.no_grad():
        model.plain.weight.mul_(torch.rand(16, 16) < 0.2)
    fast = accelerate(model, ids)
    told = notes(fast)
    assert kinds(fast) == ["InferenceLinear"]
    for name, reason in {
        "table": "a table",
        "head": "tied to table",
        "hooked": "has hooks",
        "own": "Own: no sparse layer",
        "normed.parametrizations.weight.original": "remove_parametrizations",
        "attention.in_proj_weight": "fused projections",
        "attention.out_proj": "no sparse layer",
        "line": "Conv1d: no sparse layer",
        "volume": "Conv3d: no sparse layer",
        "grouped": "2 groups",
        "unused": "not called",
        "wide": "float64",
        "scale": "Everything: no sparse layer",
    }.items():
        assert reason in told.pop(name)
    assert not told
    torch.testing.assert_close(fast(ids), model.eval()(ids))


def test_a_layer_in_two_places_is_replaced_in_both() -> None:
    layer = nn.Linear(16, 16)
    model, x = prune(nn.Sequential(layer, nn.ReLU(), layer), 0.3), torch.randn(4, 16)
    fast = accelerate(model, x)
    assert fast[0] is fast[2]
    assert kinds(fast) == ["InferenceLinear"]
    torch.testing.assert_close(fast(x), model(x))


# State -------------------------------------------------------------------------------------------


class Streaming(nn.Module):
    """Remembers, counts in a buffer, in a number and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.register_buffer("memory", torch.zeros(4, 16))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.count, self.past = 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.past.append(x)
        y = torch.tanh(self.fc(x)) + 0.5 * self.memory + self.count
        self.memory.copy_(y)
        return y


def test_stateful_models_come_back_in_the_state_that_they_were_given_in() -> None:
    model, x = prune(Streaming(), 0.3), torch.randn(4, 16)
    with torch.no_grad():
        model(x)
        fast = accelerate(model, x)
        for one in (model, fast):
            assert (int(one.calls), one.count, len(one.past)) == (1, 1, 1)
        assert torch.equal(fast.memory, model.memory)
        for _ in range(3):
            torch.testing.assert_close(fast(x), model(x))
    assert "changes" in plan_of(fast).untraced


# Other inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("traced", [True, False])
def test_empty_batches(traced: bool) -> None:
    body = [nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    model = prune(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))
    fast = accelerate(model, torch.randn(2, 4, 8, 8))
    if not traced:
        del fast.forward
    assert fast(torch.zeros(0, 4, 8, 8)).shape == (0, 4)
    assert fast[5](torch.zeros(0, 3, 8)).shape == (0, 3, 4)


def test_many_sizes_take_no_more_memory_than_the_dense_weight() -> None:
    layer = InferenceConv2d(prune(nn.Conv2d(32, 32, 3, padding=1), 0.3))
    for size in range(8, 40):
        layer(torch.randn(1, 32, size, size))
    kept = layer.product()._prepared
    entries = layer.values.numel()
    assert 2 <= len(kept) <= 32 * 32 * 9 * 4 / (6 * entries)
    assert all(isinstance(key, Geometry) for key in kept)


# The fast path -----------------------------------------------------------------------------------


class Switches(nn.Module):
    """Asks its own attributes which way to go."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.config, self.factors = SimpleNamespace(factor=1.0), [1.0]
        self.twice, self.head, self.drop = False, nn.Linear(16, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.drop(self.body(x)))
        y = y * self.config.factor * math.prod(self.factors)
        return 2 * y if self.twice else y


def test_the_graph_runs_only_while_the_model_is_as_it_was_traced() -> None:
    model, x = prune(Switches(), 0.3), torch.randn(4, 16)
    fast = accelerate(model, x)
    assert fused(fast)
    assert type(fast) is Switches
    fast.twice = True
    torch.testing.assert_close(fast(x), 2 * model(x))
    fast.twice = False
    torch.testing.assert_close(fast(x), model(x))
    fast.config.factor = 3.0
    torch.testing.assert_close(fast(x), 3 * model(x))
    fast.config.factor = 1.0
    fast.factors.append(2.0)
    torch.testing.assert_close(fast(x), 2 * model(x))
    fast.factors.pop()
    fast.extra = 1
    torch.testing.assert_close(fast(x), model(x))
    seen: list[Any] = []
    handle = fast.body.register_forward_hook(lambda *args: seen.append(args))
    torch.testing.assert_close(fast(x), model(x))
    assert len(seen) == 1
    handle.remove()
    fast.body[1] = nn.Tanh()
    torch.testing.assert_close(fast(x), model.head(torch.tanh(model.body[0](x))))
    fast.body[1] = nn.ReLU()
    fast.drop.register_forward_hook(lambda *args: seen.append(args))  # was taken out of the graph
    fast(x)
    assert len(seen) == 2
    with torch.no_grad():
        fast.drop.train()
        torch.manual_seed(0)
        assert not torch.equal(fast(x), fast(x))  # dropout


def test_copies_and_pickles_have_a_fast_path_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.fx is not used while other threads may run modules: those of the test runner do not.
    monkeypatch.setattr("threading.enumerate", lambda: [threading.current_thread()])
    model, x = prune(Switches(), 0.3), torch.randn(4, 16)
    fast = accelerate(model, x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(accelerate(Body(), x)))):
        wanted = model(x) if type(other) is Switches else other.fc(x)
        torch.testing.assert_close(other(x), wanted)
        assert fused(other) is not fused(fast)
        assert next(other.children()) is not next(fast.children())
        assert not any("forward" in name for name in other.state_dict())
    assert str(fused(fast).code)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        prune(self, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


# Programs ----------------------------------------------------------------------------------------


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    body = [nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return prune(model, 0.3), torch.randn(2, 4, 8, 8)


def test_exported_programs_keep_the_sparse_layers(tmp_path: Path) -> None:
    model, x = network()
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("rows", min=4)}
    with torch.no_grad():
        program = torch.export.export(accelerate(model, x), (x,), dynamic_shapes=(sizes,))
        torch.export.save(program, tmp_path / "x.pt2")
        again = torch.export.load(tmp_path / "x.pt2").module()
        for y in (x, torch.randn(5, 4, 20, 8)):
            torch.testing.assert_close(again(y), model(y))
    called = [str(node.target) for node in program.graph.nodes if "spartan" in str(node.target)]
    assert called == ["spartan.sparse_conv2d.default", "spartan.sparse_linear.default"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_and_operators_keep_the_sparse_layers(tmp_path: Path) -> None:
    model, x = network()
    fast = accelerate(model, x)
    with torch.no_grad():
        traced = torch.jit.trace(fast, x)
        torch.jit.save(traced, tmp_path / "x.pt")
        again = torch.jit.load(tmp_path / "x.pt")
        torch.testing.assert_close(again(x), model(x))
    for layer, y in ((fast[0], x), (fast[5], torch.randn(3, 8))):
        parts = (layer.values, layer.columns, layer.starts, layer.bias, layer.outputs)
        if isinstance(layer, InferenceConv2d):
            sizes = [
                list(s) for s in (layer.kernel_size, layer.stride, layer.zeros, layer.dilation)
            ]
            library.opcheck(torch.ops.spartan.sparse_conv2d.default, (y, *parts, *sizes))
        else:
            library.opcheck(torch.ops.spartan.sparse_linear.default, (y, *parts))


def test_a_written_weight_is_in_states_and_programs(recwarn: Any) -> None:
    model = prune(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), 0.3)
    x = torch.randn(3, 8)
    for use in ("state", "operators", "load"):
        fast = accelerate(model, x)
        with torch.no_grad():
            fast(x)
            if use == "load":
                other = prune(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), 1.0)
                fast.load_state_dict(other.state_dict())
                assert torch.equal(fast(x), other(x))
                continue
            fast[0].weight.mul_(2)
            wanted = F.relu(F.linear(x, 2 * model[0].weight, model[0].bias))
            if use == "state":
                assert torch.equal(fast.state_dict()["0.weight"], 2 * model[0].weight)
            else:
                with pytest.raises(DeployError, match="run it once"):
                    torch.export.export(fast, (x,))
            torch.testing.assert_close(fast(x), wanted)


def test_operators_tell_tensors_apart() -> None:
    layer = InferenceLinear(pruned_linear())
    x, operator = torch.randn(3, 24), torch.ops.spartan.sparse_linear
    parts = (layer.values, layer.columns, layer.starts)
    plain = operator(x, *parts, None, 16)
    for bias in (torch.ones(16), torch.full((16,), 2.0)):
        torch.testing.assert_close(operator(x, *parts, bias, 16), plain + bias)
        bias.data.add_(1.0)
        torch.testing.assert_close(operator(x, *parts, bias, 16), plain + bias)


def test_weights_on_demand_are_dense_to_c_code() -> None:
    dense = torch.randn(3, 4)
    weight = WeightOnDemand((3, 4), dense, lambda: dense)
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(torch.add(weight, 1), dense + 1)
