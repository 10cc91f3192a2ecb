"""What a graph would get wrong runs through the model's own code."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spartan
from spartan.deploy.accelerating import plan_of
from spartan.errors import DeployError
from tests.deploy import architectures
from tests.deploy.test_accelerate import kinds, prune

LOG: list[int] = []


@pytest.fixture(autouse=True)
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("accelerating", "choosing"):
        monkeypatch.setattr(f"spartan.deploy.{module}.time_side_by_side", architectures.sparse_wins)


class Way(nn.Module):
    """Two layers, and what its forward does between them."""

    def __init__(self, way: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(16, 16), nn.Linear(16, 16), way
        self.state = SimpleNamespace(last=None)

    def forward(self, x: Tensor) -> Any:
        return self.way(self, F.relu(self.a(x)))


def remember(m: Any, y: Tensor) -> Tensor:
    m.state.last = y
    return m.b(y)


def log(m: Any, y: Tensor) -> Tensor:
    LOG.append(len(y))
    return m.b(y)


def fill(m: Any, y: Tensor) -> Tensor:
    z = torch.zeros(4, 16)
    z[:, :8] = m.b(y)[:, :8]
    return z


def differentiate(m: Any, y: Tensor) -> Tensor:
    with torch.enable_grad():
        z = y.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((z * z).sum(), z)
    return m.b(gradient)


WAYS: dict[str, Callable[[Any, Tensor], Any]] = {
    "remembers": remember,
    "logs": log,
    "fills a tensor": fill,
    "differentiates": differentiate,
    "asks for a mode": lambda m, y: m.b(y) * (2 if torch.is_grad_enabled() else 1),
    "returns another dict": lambda m, y: OrderedDict(out=m.b(y)),
    "returns integers": lambda m, y: m.b(y).argmax(-1),
    "returns complex numbers": lambda m, y: torch.fft.fft(m.b(y)),
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_that_a_trace_does_not_see(name: str) -> None:
    torch.manual_seed(0)
    model, x = prune(Way(WAYS[name]), 0.3), torch.randn(4, 16)
    fast = spartan.accelerate(model, x, seconds=0.0, verbose=False)
    assert kinds(fast) == ["InferenceLinear"] * 2
    assert plan_of(fast).traced == ("numbers" in name or "integers" in name)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            found, wanted = fast(x), model(x)
        assert type(found) is type(wanted)
        torch.testing.assert_close(found, wanted)
    if name == "remembers":
        torch.testing.assert_close(fast.state.last, model.state.last)


def test_layers_that_are_called_from_a_plain_list_stay_dense() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.first = [self.a]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.first[0](x))

    model, x = prune(Listed(), 0.3), torch.randn(4, 16)
    fast = spartan.accelerate(model, x, seconds=0.0, verbose=False)
    assert [layer.format for layer in plan_of(fast).layers] == ["dense", "rows"]
    assert "from a list" in plan_of(fast).layers[0].note


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("call", [spartan.accelerate, spartan.purge])
def test_models_without_layers_to_work_on_are_refused(call: Callable[..., Any]) -> None:
    x = torch.randn(2, 16)
    with pytest.raises(DeployError, match="made from"):
        call(torch.jit.script(nn.Linear(16, 16)), x)
    with pytest.raises(DeployError, match="run it once"):
        call(nn.Sequential(nn.LazyLinear(16)), x)
