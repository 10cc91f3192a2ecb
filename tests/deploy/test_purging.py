"""A purged model computes what the masked one does, with fewer channels."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import spartan
from spartan.commands.models import mlp, resnet20
from spartan.deploy.removing import purge_channels
from spartan.errors import DeployError
from tests.deploy.test_accelerate import Untraceable


class Chain(nn.Module):
    """Channels with one reader: with and without padding, pooled, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 1), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(16 * 4, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Block(nn.Module):
    """Pre-activation residual block with a squeeze-and-excitation and a depthwise convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 24, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.squeeze = nn.Conv2d(24, 6, 1)
        self.excite = nn.Conv2d(6, 24, 1)
        self.conv2 = nn.Conv2d(24, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv1(F.relu(self.norm1(x))))
        y = F.relu(self.depthwise(F.relu(y)))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.conv2(y) + self.shortcut(x)


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2))
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.head(x.view(x.size(0), -1))


class Grouped(nn.Module):
    """Readers that are not understood pin what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.grouped(F.relu(self.conv1(x)))))
        y = torch.cat([x, self.conv3(x)], 1)
        return self.head(y.mean((2, 3))) + y.softmax(1).sum((1, 2, 3))[:, None]


MODELS = {
    "chain": Chain,
    "resnet20": lambda: resnet20(3, 8, 5, width=8),
    "mlp": lambda: mlp(3, 8, 5, width=32),
    "pre-activation": PreActivation,
    "grouped": Grouped,
}


def used(model: nn.Module, inputs: bool, share: float, seed: int = 0) -> nn.Module:
    """Give norms a history, biases values, and zero outputs or inputs of every layer."""
    torch.manual_seed(seed)
    model.train()
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.Linear | nn.Conv2d):
            dead = torch.rand(module.weight.shape[inputs]) < share
            with torch.no_grad():
                (module.weight.transpose(0, 1) if inputs else module.weight)[dead] = 0.0
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return model.double().eval()  # rounding is then a billionth of what is looked for


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def check(model: nn.Module, purged: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    with torch.inference_mode():
        expected, found = model(x), purged(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("example", [False, True], ids=["blind", "with example"])
@pytest.mark.parametrize("inputs", [False, True], ids=["outputs", "inputs"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_same_outputs_fewer_channels(name: str, share: float, inputs: bool, example: bool) -> None:
    model = used(MODELS[name](), inputs, share)
    before = copy.deepcopy(model.state_dict())
    purged = spartan.purge(model, torch.randn(2, 3, 8, 8).double() if example else None)
    check(model, purged)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    if share > 0:
        assert size(purged) < 0.8 * size(model)
    check(model, pickle.loads(pickle.dumps(purged)))


@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), inputs=st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_zeros(seed: int, share: float, inputs: bool) -> None:
    for make in (Chain, PreActivation):
        model = used(make(), inputs, share, seed)
        check(model, spartan.purge(model))


def test_residual_networks_lose_what_is_inside_of_branches() -> None:
    model = used(resnet20(3, 8, 5, width=8), inputs=False, share=0.5)
    purged = purge_channels(model)
    convs = {n: m for n, m in purged.model.named_modules() if isinstance(m, nn.Conv2d)}
    first, second = convs["layer1.1.conv1"], convs["layer1.1.conv2"]
    assert first.out_channels == second.in_channels < 8
    assert second.out_channels < 8  # put in its places before the addition
    assert purged.removed["layer1.1.conv2"] == 8 - second.out_channels


class Joined(nn.Module):
    """A residual connection whose channels all layers follow, and of which each reads a part."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = x + F.relu(self.second(x))
        return self.head(x.mean((2, 3)))


def test_layers_in_one_space_each_skip_what_is_zero_to_them() -> None:
    torch.manual_seed(0)
    model = Joined().double()
    with torch.no_grad():
        model.second.weight[:, :8] = 0.0
        model.second.weight[12:] = 0.0
        model.first.weight[:2] = 0.0
    purged = spartan.purge(model)
    first, second = (purged.get_submodule(name) for name in ("first", "second"))
    assert (first.out_channels, second.in_channels, second.out_channels) == (14, 8, 12)
    check(model, purged)


def test_parameters_after_purging_are_those_of_kept_inputs_and_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)
    )
    with torch.no_grad():
        model[0].weight[:3] = 0.0
        model[2].weight[:2] = 0.0
    purged = spartan.purge(model)
    expected = (5 * 3 * 9 + 5) + (4 * 5 * 9 + 4) + (4 * 4 + 4)
    assert size(purged) == expected
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(purged(x), model.eval()(x))


def test_one_constant_channel_stands_for_all_before_a_padded_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 3, padding=1))
    with torch.no_grad():
        model[0].weight[2:] = 0.0
    purged = spartan.purge(model)
    assert purged.get_submodule("0").out_channels == 3
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(purged(x), model(x))


def test_a_trained_model_is_purged_exactly() -> None:
    torch.manual_seed(0)
    for pattern in (spartan.Channel(), spartan.Channel(inputs=True)):
        model = Chain()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        budget = spartan.Budget(density=0.5, allocation="uniform")
        sparsifier = spartan.Sparsifier(
            model, optimizer, spartan.methods.Magnitude(), budget, 20,
            pattern=pattern, exclude="body.13",
        )  # fmt: skip
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(16, 3, 8, 8)).square().mean().backward()
            optimizer.step()
        sparsifier.finalize()
        model.double().eval()
        purged = spartan.purge(model)
        check(model, purged)
        assert size(purged) < 0.7 * size(model)


def test_depthwise_convolutions_go_with_their_neighbours() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1),
    )  # fmt: skip
    sparsifier = spartan.Sparsifier(
        model, None, spartan.methods.Magnitude(begin=0, end=0), 0.5, 10, spartan.Channel(),
        exclude="7",
    )  # fmt: skip
    assert [weight.name for weight in sparsifier.weights] == ["0.weight", "5.weight"]
    named = spartan.Sparsifier(
        copy.deepcopy(model), None, "spartan", 0.5, 10, "channel", include=["0", "2"]
    )
    assert [weight.name for weight in named.weights] == ["0.weight", "2.weight"]
    sparsifier.finalize()
    with torch.no_grad():  # what is pruned is nothing but its bias, which goes on: take it away
        model[0].bias[~model[0].weight.flatten(1).any(1)] = 0.0
    purged = spartan.purge(model.double().eval())
    check(model, purged)
    kept = purged.get_submodule("0").out_channels
    assert kept < 16
    assert purged.get_submodule("2").groups == kept


def test_arguments_with_defaults_do_not_keep_a_model_from_being_traced() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x: Tensor, mask: Any = None, causal: bool = False) -> Tensor:
            return self.body(x) if mask is None else self.body(x) * mask

    model = Masked().eval()
    with torch.no_grad():
        model.body[0].weight[:4] = 0.0
        model.body[0].bias[:4] = 0.0
    purged = spartan.purge(model)
    assert purged.get_submodule("body.0").out_features == 4
    x = torch.randn(5, 6)
    torch.testing.assert_close(purged(x), model(x))


def test_what_cannot_be_traced_is_refused() -> None:
    with pytest.raises(DeployError, match="cannot trace"):
        spartan.purge(Untraceable())


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.Flatten(), nn.Linear(20, 3)), (2, 5, 6)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(36, 3)), (2, 3, 8, 8)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(6, 3)), (2, 3, 8, 8)),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU("tanh"), nn.Conv2d(6, 3, 3)), (2, 3, 8, 8)),
        (nn.Sequential(nn.Linear(6, 8, bias=False), nn.Sigmoid(), nn.Linear(8, 3)), (2, 6)),
        (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)), (2, 6)),
        (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(5), nn.Linear(8, 3)), (2, 5, 6)),
        (nn.Sequential(nn.Conv2d(3, 4, 1, padding=1, padding_mode="reflect")), (2, 3, 8, 8)),
    ],
)
@pytest.mark.parametrize("inputs", [False, True])
def test_shapes_that_mislead(model: nn.Module, shape: tuple[int, ...], inputs: bool) -> None:
    model = copy.deepcopy(model).double().eval()
    torch.manual_seed(1)
    for layer in (m for m in model if hasattr(m, "reset_parameters")):
        layer.reset_parameters()  # the parameters of the test were made at import
    for layer in (m for m in model if isinstance(m, nn.Linear | nn.Conv2d)):
        dead = torch.rand(layer.weight.shape[inputs]) < 0.5
        with torch.no_grad():
            (layer.weight.transpose(0, 1) if inputs else layer.weight)[dead] = 0.0
    x = torch.randn(shape, dtype=torch.float64)
    for example in (None, x):
        with torch.inference_mode():
            torch.testing.assert_close(spartan.purge(model, example)(x), model(x))


class InPlace(nn.Module):
    """Tensors that are changed after, or while, others read them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 4, 3)
        self.relu = nn.ReLU(inplace=True)
        self.nothing = nn.Identity()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.kind == "unused result":
            self.relu(y)
            return self.second(y)
        if self.kind == "pre-activation":
            return self.second(self.relu(y)).sum((2, 3)) + y.sum((2, 3))[:, :4]
        if self.kind == "operator":
            z = y
            z += 1
            return self.second(y)
        if self.kind == "keyword":
            z = F.relu(y, inplace=True)
            return self.second(y) + self.second(z)
        if self.kind == "method":
            y.add_(1.0)
            return self.second(y)
        z = self.nothing(y)
        z += 1
        return self.second(y)


@pytest.mark.parametrize(
    "kind", ["unused result", "pre-activation", "operator", "keyword", "method", "alias"]
)
def test_changes_in_place(kind: str) -> None:
    model = used(InPlace(kind), inputs=False, share=0.6)
    check(model, spartan.purge(model))


class Odd(nn.Module):
    """Graphs with something in them that is not understood, or easily misunderstood."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.read = nn.Conv2d(8, 8, 3)
        self.pool = nn.AvgPool2d(2, divisor_override=1)
        self.fc = nn.Linear(8, 8)
        self.norm = nn.BatchNorm2d(8)
        self.norm.requires_grad_(False)
        self.kind = kind

    def forward(self, x: Tensor) -> object:
        y = self.conv(x)
        if self.kind == "item":
            return self.read(y), {"first": y[0]}
        if self.kind == "divisor":
            return self.read(self.pool(y))
        if self.kind == "average":
            return self.read(F.avg_pool2d(y, 2))
        if self.kind == "indices":
            return self.read(F.max_pool2d(y, 2, return_indices=True)[0])
        if self.kind == "weights apart":
            return self.read(y) + F.conv2d(y, self.read.weight)
        if self.kind == "frozen norm":
            return self.read(self.norm(F.relu(y)))
        z = self.fc(F.relu(y.mean((2, 3))))
        return F.linear(z, self.fc.weight) * y.shape[0]


@pytest.mark.parametrize(
    "kind", ["item", "divisor", "average", "indices", "weights apart", "frozen norm", "tied"]
)
def test_odd_graphs(kind: str) -> None:
    model = used(Odd(kind), inputs=False, share=0.6)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    purged = spartan.purge(model, x)
    with torch.inference_mode():
        torch.testing.assert_close(purged(x), model(x), rtol=1e-9, atol=1e-9)
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in spartan.purge(model).parameters())


def test_hooked_layers_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[:4] = 0.0
        model[2].weight[:4] = 0.0
    model[2].register_forward_hook(lambda layer, args, output: output * 2 + 3)
    x = torch.randn(5, 6)
    torch.testing.assert_close(spartan.purge(model, x)(x), model(x))
    masked = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    torch.nn.utils.prune.ln_structured(masked[0], "weight", 0.5, n=2, dim=0)
    masked(x)
    with pytest.raises(DeployError, match="prune.remove"):
        spartan.purge(masked)


def test_purged_models_can_be_purged_and_accelerated() -> None:
    model = used(resnet20(3, 8, 5, width=16), inputs=False, share=0.5)
    purged = spartan.purge(model)
    check(model, spartan.purge(purged))
    model, purged = model.float(), purged.float()
    x = torch.randn(2, 3, 8, 8)
    fast = spartan.accelerate(purged, x, verbose=False)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-4)


def test_half_precision_is_compared_as_it_can_be() -> None:
    model = used(Chain(), inputs=False, share=0.5).to(torch.bfloat16)
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    purged = spartan.purge(model, x)
    assert size(purged) < 0.8 * size(model)
    assert {p.dtype for p in purged.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        found, wanted = purged(x), model(x)
    assert (found - wanted).abs().max() <= 0.1 * wanted.abs().max()
