"""Weights that begin as all zeros, layers that end with next to nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spartan
from spartan import Budget, Sparsifier
from spartan.methods import (
    DPF,
    FCPTS,
    ConstrainedL0,
    DualAveraging,
    Magnitude,
    MaskingMethod,
    Powerpropagation,
    Spartan,
)

STEPS = 40


def with_new_head() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    nn.init.zeros_(model[2].weight)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:The gates of")
@pytest.mark.parametrize(
    "method",
    [
        Magnitude(), Spartan(), DualAveraging(), DualAveraging(backward_density=0.5),
        DPF(period=2), FCPTS(), ConstrainedL0(),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("pattern", ["unstructured", "block:2x2", "2:4"])
def test_a_new_head_learns_before_it_competes(method: MaskingMethod, pattern: str) -> None:
    if pattern == "2:4" and isinstance(method, ConstrainedL0):
        return
    model = with_new_head()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    density = 0.5 if pattern == "2:4" else 0.3
    sparsifier = Sparsifier(model, optimizer, method, Budget(density=density), STEPS, pattern)
    train(model, optimizer, STEPS)
    sparsifier.finalize()
    kept = [int(model[i].weight.count_nonzero()) for i in (0, 2)]
    assert sum(kept) == round(density * 640)
    assert kept[1] > 0


def test_until_then_it_is_whole_and_resumes_as_such() -> None:
    def start() -> tuple[nn.Sequential, torch.optim.Optimizer, Sparsifier]:
        model = with_new_head()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return (
            model,
            optimizer,
            Sparsifier(
                model, optimizer, "spartan", Budget(density=0.2, allocation="uniform"), STEPS
            ),
        )

    first = start()
    train(*first[:2], 5)
    assert first[0][2].weight.count_nonzero() == 128
    assert first[0][0].weight.count_nonzero() < 512
    other = start()
    for one, saved in zip(other, first, strict=True):
        one.load_state_dict(saved.state_dict())
    for run in (first, other):
        train(*run[:2], STEPS - 5)
        run[2].finalize()
    assert all(map(torch.equal, first[0].parameters(), other[0].parameters()))


def test_a_layer_of_its_own_budget_too() -> None:
    model = with_new_head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    budget = Budget(density=0.25, allocation="uniform")
    sparsifier = Sparsifier(model, optimizer, Magnitude(), budget, STEPS)
    train(model, optimizer, STEPS)
    sparsifier.finalize()
    assert int(model[2].weight.count_nonzero()) == 32


def test_where_zero_is_a_fixed_point_it_is_said() -> None:
    model = with_new_head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="'2.weight' begins as all zeros, which is a fixed point"):
        Sparsifier(model, optimizer, Powerpropagation(), 0.5, STEPS)
    model = with_new_head()
    with pytest.warns(UserWarning, match="the budget holds from the first step"):
        Sparsifier(model, None, Magnitude(schedule="one-shot"), 0.3, STEPS)


def test_freeze_lets_new_matrices_learn() -> None:
    model = with_new_head()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    with pytest.warns(UserWarning, match="'2.weight' holds nothing but zeros: it is left out"):
        frozen = spartan.freeze(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 5)
    frozen.finalize()
    assert int(model[0].weight.count_nonzero()) == 256
    assert int(model[2].weight.count_nonzero()) == 128


def test_freeze_names_zeros_that_it_does_not_hold() -> None:
    model = nn.ModuleDict({"rnn": nn.LSTM(8, 8), "fc": nn.Linear(8, 8)})
    with torch.no_grad():
        model["rnn"].weight_hh_l0[:, ::2] = 0
        model["fc"].weight[0] = 0
    with pytest.warns(UserWarning, match="zeros in 'rnn.weight_hh_l0', which is not pruned"):
        spartan.freeze(model).finalize()
    spartan.freeze(model, include=["fc", "rnn.weight_hh_l0"]).finalize()


def test_a_frozen_base_is_held_while_adapters_are_stepped() -> None:
    model = nn.ModuleDict({"base": nn.Linear(8, 8), "lora_A": nn.Linear(8, 2)})
    with torch.no_grad():
        model["base"].weight[0] = 0
    model["base"].requires_grad_(False)
    optimizer = torch.optim.SGD(model["lora_A"].parameters(), lr=0.1)
    frozen = spartan.freeze(model, optimizer)
    model["lora_A"](model["base"](torch.randn(4, 8))).sum().backward()
    optimizer.step()
    frozen.finalize()
    assert int(model["base"].weight.count_nonzero()) == 56


def test_weights_without_gradients_are_not_pruned_silently() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="No gradient is required of '0.weight': masked as it is"):
        Sparsifier(model, None, "magnitude", 0.5, 10)


def test_a_layer_with_next_to_nothing_is_named() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight.mul_(1e-6)[0, 0] = 1.0
    budget = Budget(density=0.3, layer_floor=0)
    with pytest.warns(UserWarning, match=r"Next to nothing is kept of '1.weight' \(1 of 4,096"):
        Sparsifier(model, None, Magnitude(schedule="one-shot"), budget, 10)
