"""Allocations: what competes, what is measured, and the dynamic program over it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import spartan
from spartan.budgets.allocation import erk_densities
from spartan.post_training import Distillation
from spartan.post_training.curves import cheapest, interpolate_losses


def compress(model: nn.Module, inputs: torch.Tensor, **options) -> spartan.CompressionReport:
    how = Distillation(steps=400, batch_size=32)
    return spartan.compress(model, inputs, method="magnitude", distillation=how, **options)


@pytest.fixture
def net(make_net) -> nn.Module:
    return make_net().eval()


def test_global_keeps_the_largest_weights_of_all(net) -> None:
    report = compress(net, torch.randn(20, 4, 4, 4), density=0.2, allocation="global")
    names = [layer.name for layer in report.layers]
    dense = torch.cat([net.get_parameter(n).detach().flatten().abs() for n in names])
    kept = torch.cat([report.model.get_parameter(n).detach().flatten() != 0 for n in names])
    assert dense[kept].min() >= dense[~kept].max()


def test_uniform_and_erk_are_what_they_say(net) -> None:
    x = torch.randn(20, 4, 4, 4)
    uniform = compress(net, x, density=0.2, allocation="uniform")
    assert all(abs(layer.nonzero - 0.2 * layer.numel) < 1 for layer in uniform.layers)
    erk = compress(net, x, density=0.2, allocation="erk")
    wanted = erk_densities([layer.shape for layer in erk.layers], 0.2)
    for layer, density in zip(erk.layers, wanted, strict=True):
        assert abs(layer.nonzero - density * layer.numel) < 1


class Unequal(nn.Module):
    """The second layer's weights are as large as the first's, and matter a hundredth."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(12, 20), nn.Linear(12, 20)
        self.quiet.load_state_dict(self.loud.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loud(x) + 0.1 * self.quiet(x.flip(1))


@pytest.mark.parametrize("allocation", ["curves", "learned"])
def test_what_matters_more_keeps_more(allocation: str) -> None:
    torch.manual_seed(0)
    model, x = Unequal().eval(), torch.randn(300, 12)
    report = compress(model, x, density=0.5, allocation=allocation)
    loud, quiet = (layer.density for layer in report.layers)
    assert loud > quiet + 0.03
    assert report.nonzero == 240
    assert report.loss < compress(model, x, density=0.5, allocation="uniform").loss


@given(
    data=st.lists(
        st.tuples(st.lists(st.floats(0, 10), min_size=4, max_size=4), st.integers(1, 50)),
        min_size=1,
        max_size=4,
    ),
    share=st.floats(0.05, 1),
)
@settings(max_examples=150, deadline=None)
def test_the_program_beats_every_other_choice(data, share: float) -> None:
    grid = np.array([1.0, 0.5, 0.25, 0.1])
    tables = [np.array(sorted(losses)) for losses, _ in data]
    wholes = [float(whole) for _, whole in data]
    budget = share * sum(wholes)
    if budget < 0.1 * sum(wholes):
        return
    chosen = cheapest(tables, grid, wholes, [0.0] * len(data), budget)
    cost = sum(w * grid[i] for w, i in zip(wholes, chosen, strict=True))
    assert cost <= budget * (1 + 1e-9)
    # Costs are rounded up to buckets: what fits with a little room to spare must not be better.
    room = budget - len(data) * budget / 1_000
    best = min(
        (
            sum(t[i] for t, i in zip(tables, choice, strict=True))
            for choice in itertools.product(range(4), repeat=len(data))
            if sum(w * grid[i] for w, i in zip(wholes, choice, strict=True)) <= room
        ),
        default=np.inf,
    )
    assert sum(t[i] for t, i in zip(tables, chosen, strict=True)) <= best + 1e-9


def test_the_program_keeps_to_the_least_densities() -> None:
    grid = np.geomspace(1, 1e-3, 50)
    tables = [np.zeros(50), 1 / grid]
    chosen = cheapest(tables, grid, [100.0, 100.0], [0.4, 0.01], 100.0)
    assert grid[chosen[0]] >= 0.4


def test_curves_are_monotone_and_pass_through_what_was_measured() -> None:
    grid = np.geomspace(1.0, 1e-3, 200)
    curve = {1.0: 0.02, 0.5: 0.1, 0.2: 0.09, 0.1: 1.0, 0.05: 3.0}  # noise at 0.2
    values = interpolate_losses(curve, grid)
    assert values[0] == pytest.approx(0.02)
    assert (np.diff(values) >= -1e-12).all()
    for density, loss in ((0.5, 0.1), (0.2, 0.1), (0.1, 1.0), (0.05, 3.0)):
        at = np.abs(grid - density).argmin()
        assert values[at] == pytest.approx(loss, rel=0.15, abs=0.02)
    assert values[-1] > 3.0
