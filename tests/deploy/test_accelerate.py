"""Accelerated models: the same numbers, the same interface, sparse only where that wins."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, fx, nn

import spartan
from spartan.deploy.accelerating import plan_of
from spartan.deploy.fast_path import FastPath
from spartan.deploy.inference_layers import InferenceConv2d, InferenceLayer, InferenceLinear
from spartan.deploy.timing import Timing, time_side_by_side
from spartan.errors import DeployError


def prune(model: nn.Module, density: float = 0.2) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data *= torch.rand_like(module.weight) < density
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.eval()


class Block(nn.Module):
    """A residual block that reuses its ReLU, strides, and adds in place."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.skip(x)
        return self.relu(y)


class Net(nn.Module):
    """Convolutions, a grouped one among them, and a head with GELU and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(3, 24, 1), Block(24, 32, 2))
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.fc1 = nn.Linear(32, 64)
        self.norm = nn.BatchNorm1d(64)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(64, 64)
        self.fc3 = nn.Linear(64, 10)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.grouped(self.blocks(x)).mean((2, 3))
        if scale is not None:
            x = x * scale
        x = self.drop(F.gelu(self.norm(self.fc1(x))))
        x = x + torch.relu(self.fc2(x))
        return self.fc3(x)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 8)
        self.note = "kept"

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        if float(y.sum()) > 1e9:
            y = -y
        return self.fc2(y)


@pytest.fixture
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every sparse layer that can be measured win, whatever this machine says."""

    def fake(calls: Sequence[Callable[[], object]], *args: Any) -> list[Timing]:
        for call in calls:
            call()
        return [Timing(1.0 / (i + 1), 0, 0, 1) for i in range(len(calls))]

    monkeypatch.setattr("spartan.deploy.accelerating.time_side_by_side", fake)
    monkeypatch.setattr("spartan.deploy.choosing.time_side_by_side", fake)


def accelerate(model: nn.Module, x: Any) -> nn.Module:
    return spartan.accelerate(model, x, seconds=0.01, verbose=False)


def fused(fast: nn.Module) -> fx.GraphModule:
    """Return the graph that an accelerated model takes for the arguments of its example."""
    path = fast.forward
    assert isinstance(path, FastPath)
    assert path.graph is not None
    return path.graph


def path_of(fast: nn.Module) -> FastPath:
    path = fast.forward
    assert isinstance(path, FastPath)
    return path


def kinds(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if isinstance(m, InferenceLayer)]


def assert_same(fast: nn.Module, model: nn.Module, x: Any) -> None:
    """Assert that an accelerated model is as near to the exact outputs as the dense one is."""
    with torch.inference_mode():
        found, wanted = fast(x), model(x)
        exact = copy.deepcopy(model).double()(x.double())
    assert found.shape == wanted.shape
    own = (wanted.double() - exact).norm()
    assert (found.double() - exact).norm() <= 10 * own + 1e-6 * exact.norm()


@pytest.mark.usefixtures("sparse_wins")
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_network_with_everything(batch: int) -> None:
    model = prune(Net())
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(batch, 3, 12, 12)
    fast = accelerate(model, x)
    assert_same(fast, model, x)
    assert_same(fast, model, torch.randn(batch + 3, 3, 20, 14))  # other sizes work too
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    plan = plan_of(fast)
    assert plan.traced
    notes = {layer.name: layer.format for layer in plan.layers}
    assert notes.pop("grouped") == "dense"
    assert set(notes.values()) == {"rows"}
    # Norms, additions and activations went into the layers before them.
    code = fused(fast).code
    assert not any(word in code for word in ("relu", "gelu", "dropout", "norm"))
    assert code.count("addend = ") == 2
    names = {module: name for name, module in fast.named_modules()}
    calls = {names[call.layer]: call for call in path_of(fast).layers}
    normed = {name for name, call in calls.items() if call.norm is not None}
    assert normed == {f"blocks.{i}.conv{k}" for i in (0, 1) for k in (1, 2)} | {"fc1"}
    relus = {name for name, call in calls.items() if call.activation == "relu"}
    assert relus == normed - {"fc1"} | {"fc2"}
    assert calls["fc1"].activation == "gelu"


@pytest.mark.usefixtures("sparse_wins")
def test_a_layer_that_two_norms_follow() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm2(self.conv(self.norm1(self.conv(x))))

    model, x = prune(Twice(), 0.5), torch.randn(2, 4, 6, 6)
    fast = accelerate(model, x)
    assert len({call.norm for call in path_of(fast).layers}) == 2
    assert_same(fast, model, x)
    assert_same(fast, model, x)


@pytest.mark.usefixtures("sparse_wins")
def test_activations_stay_feature_major_between_sparse_layers() -> None:
    model = prune(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 96), nn.Linear(96, 4)))
    x = torch.randn(2, 17, 64)
    fast = accelerate(model, x)
    assert_same(fast, model, x)
    assert [call.feature_major for call in path_of(fast).layers] == [True, True, False]


@pytest.mark.usefixtures("sparse_wins")
def test_what_is_used_elsewhere_is_not_fused() -> None:
    class Reuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.twice = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            z = torch.relu(y) + y + y.sum(1, keepdim=True)
            z = self.twice(torch.relu(self.twice(z)))
            z = z + z
            return z + x[:1]  # broadcast: no addend

    model = prune(Reuse(), 0.5)
    x = torch.randn(4, 16)
    assert_same(accelerate(model, x), model, x)


@pytest.mark.usefixtures("sparse_wins")
def test_keyword_inputs_and_defaults() -> None:
    model = prune(Net())
    x, scale = torch.randn(2, 3, 12, 12), torch.rand(2, 32)
    fast = accelerate(model, {"x": x, "scale": scale})
    with torch.inference_mode():
        assert torch.allclose(fast(x, scale), model(x, scale), atol=1e-5)
        assert torch.allclose(fast(x=x, scale=scale), model(x, scale), atol=1e-5)


@pytest.mark.usefixtures("sparse_wins")
def test_models_that_cannot_be_traced_keep_their_class() -> None:
    model = prune(Untraceable())
    x = torch.randn(5, 32)
    fast = accelerate(model, x)
    assert isinstance(fast, Untraceable)
    assert fast.note == "kept"
    assert kinds(fast) == ["InferenceLinear", "InferenceLinear"]
    assert not plan_of(fast).traced
    assert "nothing was fused: torch.fx cannot trace it" in str(plan_of(fast))
    assert_same(fast, model, x)


@pytest.mark.usefixtures("sparse_wins")
def test_attention_layers_still_work() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
    model = prune(nn.TransformerEncoder(layer, 2))
    x = torch.randn(3, 7, 32)
    fast = accelerate(model, x)
    assert kinds(fast) == ["InferenceLinear"] * 4
    assert_same(fast, model, x)


@pytest.mark.usefixtures("sparse_wins")
def test_blocks_run_as_blocks() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    for i in (0, 2):
        model[i].weight.data *= (torch.rand(4, 64) < 0.2).repeat_interleave(16, 0)
    x = torch.randn(40, 64)
    fast = accelerate(model, x)
    assert [layer.format for layer in plan_of(fast).layers] == ["rows of 16"] * 2
    assert [layer.pattern for layer in plan_of(fast).layers] == ["16 rows"] * 2
    assert_same(fast, model, x)


@pytest.mark.usefixtures("sparse_wins")
def test_patterns_are_named() -> None:
    weight = torch.zeros(8, 4, 8)
    weight[..., :2] = torch.randn(8, 4, 2)
    model = nn.Sequential(nn.Linear(32, 8))
    model[0].weight.data = weight.view(8, 32)[torch.arange(8)].roll(1, 1)
    (layer,) = plan_of(accelerate(model, torch.randn(1, 32))).layers
    assert layer.pattern in ("2:8", "8 rows")


@pytest.mark.usefixtures("sparse_wins")
def test_pickle_copy_and_state_dict() -> None:
    model = prune(Net())
    x = torch.randn(2, 3, 12, 12)
    fast = accelerate(model, x)
    for other in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast)):
        assert kinds(other) == kinds(fast)
        assert_same(other, model, x)

    changed = copy.deepcopy(fast)
    state = {k: v * 0 if k.endswith("values") else v for k, v in fast.state_dict().items()}
    changed.load_state_dict(state)
    with torch.inference_mode():
        assert not torch.allclose(changed(x), model(x))
    changed.load_state_dict(fast.state_dict())
    assert_same(changed, model, x)


@pytest.mark.usefixtures("sparse_wins")
def test_made_and_used_in_inference_mode_and_by_threads() -> None:
    model = prune(Net())
    x = torch.randn(2, 3, 12, 12)
    with torch.inference_mode():
        fast = accelerate(model, x)
    assert_same(fast, model, x)
    with torch.no_grad():
        assert fast(x).shape == (2, 10)

    def run(seed: int) -> bool:
        y = torch.randn(1 + seed % 3, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            return torch.allclose(fast(y), model(y), atol=1e-4)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(12)))


@pytest.mark.usefixtures("sparse_wins")
def test_gradients_are_refused() -> None:
    model = prune(nn.Sequential(nn.Linear(16, 16)))
    fast = accelerate(model, torch.randn(2, 16))
    with pytest.raises(DeployError, match="no gradient"):
        fast(torch.randn(2, 16, requires_grad=True))


@pytest.mark.usefixtures("sparse_wins")
def test_wrong_inputs_are_named() -> None:
    fast = accelerate(prune(nn.Sequential(nn.Linear(16, 16))), torch.randn(2, 16))
    with pytest.raises(DeployError, match="16 inputs"):
        fast(torch.randn(2, 15))
    conv = InferenceConv2d(nn.Conv2d(3, 4, 3))
    with pytest.raises(DeployError, match="3 channels"):
        conv(torch.randn(1, 4, 8, 8))
    with pytest.raises(DeployError, match="smaller"):
        conv(torch.randn(1, 3, 2, 8))
    assert conv(torch.randn(3, 8, 8)).shape == (4, 6, 6)
    with pytest.raises(DeployError, match="does not run"):
        accelerate(nn.Linear(4, 4), torch.randn(2, 5))


@pytest.mark.usefixtures("sparse_wins")
def test_models_with_random_outputs_draw_what_the_dense_one_draws() -> None:
    class Noise(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn_like(x)

    model = prune(nn.Sequential(Noise(8, 8), nn.Linear(8, 8)), 0.5)
    x = torch.randn(4, 8)
    fast = accelerate(model, x)
    assert kinds(fast) == ["InferenceLinear"]
    torch.manual_seed(1)
    wanted = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fast(x), wanted)
    assert not plan_of(fast).warnings


@pytest.mark.usefixtures("sparse_wins")
def test_what_changes_from_run_to_run_is_told() -> None:
    class Clock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + next(clock)

    clock = iter(range(10**9))
    (warning,) = plan_of(accelerate(prune(Clock()), torch.randn(4, 8))).warnings
    assert "from run to run" in warning


class Residual(nn.Module):
    """A linear layer to whose result something is added."""

    def __init__(self, add: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.relu, self.add = nn.Linear(16, 16), nn.ReLU6(), add

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self, x)


def add_to_alias(m: Any, x: Tensor) -> Tensor:
    h = x * 2
    kept = h
    h += m.fc(x)
    return kept + h


def change_input_first(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    y = m.fc(x)
    r = F.relu(x, inplace=True)
    return y + r


@pytest.mark.usefixtures("sparse_wins")
@pytest.mark.parametrize(
    "add",
    [
        add_to_alias,
        change_input_first,
        lambda m, x: m.relu(m.fc(x) * 9),
        lambda m, x: m.relu(m.fc(x)),
        lambda m, x: x + m.fc(x[:1]),
        lambda m, x: m.fc(x) + (x > 0),
        lambda m, x: m.fc(x) + x.double(),
        lambda m, x: F.dropout(m.fc(x), training=False) + x,
        lambda m, x: torch.add(m.fc(x), x, alpha=2),
    ],
)
def test_additions_of_every_kind(add: Callable[[Any, Tensor], Tensor]) -> None:
    model = prune(Residual(add), 0.5)
    fast = accelerate(model, torch.randn(1, 16))
    for samples in (1, 7):
        x = 10 * torch.randn(samples, 16)
        with torch.inference_mode():
            found, wanted = fast(x.clone()), model(x.clone())
        assert found.dtype == wanted.dtype
        assert torch.allclose(found, wanted, atol=1e-4)


def test_addends_that_do_not_fit_the_product_are_added_behind_it() -> None:
    layer, conv = InferenceLinear(nn.Linear(8, 8)), InferenceConv2d(nn.Conv2d(3, 4, 3))
    x, images = torch.randn(6, 8), torch.randn(2, 3, 5, 5)
    for addend in (torch.randn(8), torch.randn(3, 6, 8), torch.ones(6, 8, dtype=torch.bool),
                   torch.randn(6, 8).half(), torch.randn(6, 8).double()):  # fmt: skip
        assert torch.equal(layer(x, addend, "relu"), F.relu(layer.product().linear(x) + addend))
    se = torch.randn(2, 4, 1, 1)
    assert torch.equal(conv(images, se, "relu"), F.relu(conv.product().convolution(
        images, conv.geometry(tuple(images.shape), 1)) + se))  # fmt: skip


@pytest.mark.usefixtures("sparse_wins")
def test_arguments_that_the_example_left_out_can_be_given() -> None:
    model = prune(Net())
    x, scale = torch.randn(2, 3, 12, 12), torch.rand(2, 32)
    fast = accelerate(model, x)
    assert plan_of(fast).traced
    torch.testing.assert_close(fast(x, scale), model(x, scale), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast(scale=scale, x=x), model(x, scale), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("sparse_wins")
def test_other_dtypes_and_autocast() -> None:
    model = prune(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)))
    x = torch.randn(5, 32)
    fast = accelerate(model, x)
    wanted = model(x)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        other = copy.deepcopy(fast).to(dtype)
        assert torch.allclose(other(x.to(dtype)).float(), wanted, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(fast(x).float(), wanted, atol=0.05)
        assert torch.allclose(fast(x.bfloat16()).float(), wanted, atol=0.05)


@pytest.mark.usefixtures("sparse_wins")
def test_layers_at_the_root_and_norms_over_other_axes() -> None:
    x = torch.randn(4, 6, 16)
    for model in (
        nn.Linear(16, 24),
        nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(6), nn.Linear(24, 4)),
        nn.Sequential(nn.Linear(16, 6), nn.BatchNorm1d(6)),
    ):
        fast = accelerate(prune(model, 0.3), x)
        assert kinds(fast)
        assert_same(fast, model, x)


@pytest.mark.usefixtures("sparse_wins")
def test_not_a_number_is_compared_too() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.log(self.fc(x))

    model = prune(Log())
    model.fc.weight.data *= 0.1  # sums move by less than 1: log of about 1, and of about -1
    model.fc.bias.data = torch.tensor([1.0, -1.0]).repeat(8)
    x = torch.randn(20, 16).clamp(-2, 2)
    fast = accelerate(model, x)
    with torch.inference_mode():
        found, wanted = fast(x), model(x)
    assert wanted.isnan().any()
    assert not wanted.isnan().all()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_pruned_by_torch_needs_prune_remove() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", 0.9)
    model(torch.randn(2, 16)).sum().backward()
    with pytest.raises(DeployError, match=r"prune\.remove"):
        accelerate(model, torch.randn(2, 16))


@pytest.mark.usefixtures("sparse_wins")
@pytest.mark.parametrize("as_mapping", [False, True])
def test_inputs_that_a_traced_model_writes_into(as_mapping: bool) -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
            return self.fc(x.add_(1))

    x = torch.zeros(2, 16)
    fast = accelerate(prune(Shift()), {"x": x} if as_mapping else x)
    assert plan_of(fast).traced
    assert not x.any()


class WithDefaults(nn.Module):
    """As vision transformers take a mask, and whether it is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, causal: bool = False
    ) -> Tensor:
        y = self.fc(x) * scale
        if causal:
            y = y.cumsum(1)
        return y if mask is None else y * mask


@pytest.mark.usefixtures("sparse_wins")
@pytest.mark.parametrize("as_mapping", [False, True])
def test_arguments_that_keep_their_defaults(as_mapping: bool) -> None:
    x = torch.randn(2, 16)
    model = prune(WithDefaults())
    fast = accelerate(model, {"x": x} if as_mapping else x)
    assert plan_of(fast).traced
    torch.testing.assert_close(fast(x), model(x))
    torch.testing.assert_close(fast(x, None, 2.0, False), model(x))
    again = pickle.loads(pickle.dumps(fast))
    torch.testing.assert_close(again(x), model(x))
    torch.testing.assert_close(fast(x, scale=2.0, mask=None, causal=False), model(x))
    changes: list[dict[str, Any]] = [{"scale": 3.0}, {"causal": True}, {"mask": x}]
    for changed in changes:
        for one in (fast, again):
            torch.testing.assert_close(one(x, **changed), model(x, **changed))


@pytest.mark.usefixtures("sparse_wins")
def test_what_a_model_asserts_itself_stays() -> None:
    class Checking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            torch._assert(x.shape[1] == 16, "Wrong width, 16 is needed")
            return self.fc(x)

    x = torch.randn(2, 16)
    fast = accelerate(prune(Checking()), x)
    assert plan_of(fast).traced
    with pytest.raises(AssertionError, match="Wrong width"):
        fast(torch.randn(2, 8))


def test_nothing_of_the_caller_changes() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x += 1
            return self.fc(x)

    model = Counting()
    x = torch.zeros(2, 64)
    accelerate(model, x)
    assert not x.any()
    assert not model.calls.any()
    assert all(p.requires_grad for p in model.parameters())


def test_dense_layers_and_other_dtypes_stay_dense() -> None:
    for dtype, density in ((torch.float32, 1.0), (torch.bfloat16, 0.1)):
        model = prune(nn.Sequential(nn.Linear(128, 128)), density).to(dtype)
        x = torch.randn(2, 128, dtype=dtype)
        fast = accelerate(model, x)
        (layer,) = plan_of(fast).layers
        assert layer.format == "dense"
        assert layer.note
        with torch.inference_mode():
            assert torch.equal(fast(x), model(x))


def test_the_slower_side_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def dense_wins(calls: Sequence[Any], *args: Any) -> list[Timing]:
        return [Timing(1.0 + i, 0, 0, 1) for i in range(len(calls))]

    monkeypatch.setattr("spartan.deploy.choosing.time_side_by_side", dense_wins)
    fast = accelerate(prune(nn.Sequential(nn.Linear(64, 64))), torch.randn(2, 64))
    (layer,) = plan_of(fast).layers
    assert layer.format == "dense"
    assert layer.sparse is not None
    assert not kinds(fast)
    assert type(fast) is nn.Sequential
    assert "plain copy" in str(plan_of(fast))


def test_the_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = prune(nn.Sequential(nn.Linear(64, 64)), 0.1)
    spartan.accelerate(model, torch.randn(2, 64), seconds=0.01)
    printed = capsys.readouterr().out
    assert "64x64" in printed
    assert "whole model: dense" in printed


def test_timings_are_of_the_right_function() -> None:
    calls: list[str] = []
    a, b = time_side_by_side([lambda: calls.append("a"), lambda: calls.append("b")], 0.0, 7)
    assert calls.count("a") == calls.count("b") == 15
    assert a.rounds == b.rounds == 7
    assert a.low <= a.median <= a.high


def test_training_mode_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout())
    model.train()
    model[0].eval()
    accelerate(model, torch.randn(2, 64))
    assert (model.training, model[0].training, model[1].training) == (True, False, True)
