"""Models that cannot be traced whole: purged part by part, or told why not, and never changed."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spartan
from spartan.deploy.comparison import relative_error
from spartan.deploy.removing import purge_channels
from spartan.errors import DeployError
from tests.deploy.architectures import prune


class Part(nn.Module):
    """Two layers that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class Whole(nn.Module):
    """Cannot be traced, as it branches on values; nor can one of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Part(), Part()])
        self.odd = Branching()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        for part in self.parts:
            x = x + part(x)
        if float(x.sum()) > 1e9:
            return x
        return self.head(self.odd(x))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if float(x.sum()) < 1e9 else x


def same(small: nn.Module, model: nn.Module, x: Tensor) -> bool:
    with torch.inference_mode():
        return relative_error(small(x), model(x)) <= 1e-5


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parts_are_purged_and_the_rest_is_told() -> None:
    torch.manual_seed(0)
    model, x = prune(Whole()), torch.randn(3, 16)
    with pytest.warns(UserWarning, match="'odd.fc'.*still computes outputs that are zero"):
        small = spartan.purge(model, x)
    assert isinstance(small, Whole)
    assert same(small, model, torch.randn(5, 16))
    purged = purge_channels(model, x)
    assert {"parts.0.a", "parts.1.a"} <= purged.removed.keys()
    assert "cannot trace" in purged.kept["odd.fc"]
    assert size(small) < size(model)
    with pytest.raises(DeployError, match="example input"):
        spartan.purge(model)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_feed_forward_of_torchs_transformer_layers(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True, activation="gelu")
        model, example = prune(nn.TransformerEncoder(layer, 2)), (x,)
    else:
        layer = nn.TransformerDecoderLayer(16, 2, 64, batch_first=True)  # type: ignore[assignment]
        model, example = prune(nn.TransformerDecoder(layer, 2)), (x, torch.randn(2, 3, 16))  # type: ignore[arg-type, assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = spartan.purge(model, example)
    assert small.layers[0].linear1.out_features < 64
    with torch.inference_mode():
        assert relative_error(small(*example), model(*example)) <= 1e-5


@functools.singledispatch
def is_a_tensor(x: object) -> bool:
    return False


@is_a_tensor.register
def _(x: Tensor) -> bool:
    return True


class Asks(nn.Module):
    """Goes another way for what a trace runs on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.n, self.names = how, 0, ["x"]
        self.first, self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.asks(x):
            x = self.first(x)
        return self.b(F.relu(self.a(x)))

    def asks(self, x: Tensor) -> bool:
        if self.how == "isinstance":
            return isinstance(x, Tensor)
        if self.how == "type":
            return type(x) is Tensor
        if self.how == "hasattr":
            return hasattr(x, "untyped_storage")
        if self.how == "is_tensor":
            return torch.is_tensor(x)
        if self.how == "class":
            return x.__class__ is Tensor
        if self.how == "match":
            match x:
                case Tensor():
                    return True
            return False
        if self.how == "dispatch":
            return is_a_tensor(x)
        if self.how == "counter":
            self.n += 1
            return self.n > 1
        if self.how == "buffer":
            self.calls += 1
            return bool(self.calls > 1)
        self.names.append("x")
        return len(self.names) > 2


@pytest.mark.parametrize(
    "how",
    [
        *("isinstance", "type", "hasattr", "is_tensor", "class", "match", "dispatch"),
        *("counter", "buffer", "list"),
    ],
)
def test_branches_that_a_trace_does_not_see_are_noticed(how: str) -> None:
    torch.manual_seed(0)
    model, x = prune(Asks(how)), torch.randn(4, 16)
    with pytest.raises(DeployError, match="asks for a type|changes"):
        spartan.purge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = spartan.purge(model, x)  # part by part
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(small(x), model(x))
