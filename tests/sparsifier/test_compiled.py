"""Compiled models, optimizer steps and whole steps: the same run, without graphs of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from spartan import Sparsifier
from spartan.methods import ConstrainedL0, Magnitude, Spartan

METHODS: dict[str, Callable[[], Any]] = {
    "spartan": Spartan,
    "magnitude": Magnitude,
    "gates": lambda: ConstrainedL0(gate_lr=1.0),
}
STEPS = 12
pytestmark = [
    pytest.mark.filterwarnings("ignore:The gates of .* reached an expected density"),
    pytest.mark.filterwarnings("ignore:.*record_function"),
]


class Run:
    """Trains a small network, and counts the graphs that were compiled in the course of it."""

    def __init__(self, method: str) -> None:
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))
        self.called: Any = self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.step: Any = self.optimizer.step
        self.method = METHODS[method]()

    def attach(self, model: Any = None) -> None:
        model = model or self.model
        self.sparsifier = Sparsifier(model, self.optimizer, self.method, 0.25, STEPS)

    def compile(self, function: Any, fullgraph: bool = False) -> Any:
        return torch.compile(function, fullgraph=fullgraph, backend="eager")

    def train(self, whole: bool = False) -> list[torch.Tensor]:
        def one(x: torch.Tensor, y: torch.Tensor) -> None:
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.called(x), y).backward()
            self.step()

        do = self.compile(one) if whole else one
        for step in range(STEPS):
            x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
            do(x, x[:, :4].argmax(1))
            if step == 1:
                early = counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == early
        assert self.sparsifier.step == STEPS
        self.sparsifier.finalize()
        assert self.sparsifier.density == 0.25
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def plainly(method: str) -> list[torch.Tensor]:
    run = Run(method)
    run.attach()
    return run.train()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", [True, False])
def test_a_compiled_model_is_one_graph_and_the_same_run(method: str, first: bool) -> None:
    run = Run(method)
    whole = method != "gates" or first  # gates write weights before each pass
    if first:
        run.called = run.compile(run.model, fullgraph=True)
        run.attach(run.called)
    else:
        run.attach()
        run.called = run.compile(run.model, fullgraph=whole)
    assert all(map(torch.equal, run.train(), plainly(method)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_step_is_the_same_run_but_for_rounding(method: str, whole: bool) -> None:
    run = Run(method)
    run.attach()
    if not whole:
        run.step = run.compile(run.step)
    for one, other in zip(run.train(whole), plainly(method), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_gates_say_how_to_compile_where_they_would_be_traced() -> None:
    run = Run("gates")
    run.attach()
    run.called = run.compile(run.model, fullgraph=True)
    with pytest.raises(Exception, match="give the compiled model to the Sparsifier"):
        run.train()
