"""The arguments of a sparsifier: names and numbers for objects, one sentence for every slip."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import spartan
from spartan import Budget, Sparsifier
from spartan.errors import BudgetError, MethodError, PatternError, PrunableError, StateError
from spartan.methods import Magnitude, Spartan


def made(**changed: Any) -> Sparsifier:
    model = nn.Linear(8, 8)
    named = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "method": "spartan",
        "budget": 0.5,
        "total_steps": 10,
    }
    return Sparsifier(**(named | changed))


def test_a_name_and_a_number_do_what_objects_do() -> None:
    sparsifier = made(pattern="2:4", method="magnitude")
    assert sparsifier.method == Magnitude()
    assert sparsifier.budget == Budget(density=0.5)
    assert sparsifier.pattern == spartan.NM(2, 4)


def test_help_shows_what_to_give() -> None:
    parameters = inspect.signature(Sparsifier).parameters
    assert list(parameters) == [
        "model", "optimizer", "method", "budget", "total_steps", "pattern", "include", "exclude",
        "checkpoint_with",
    ]  # fmt: skip
    source = inspect.getsource(Sparsifier.step.fget)  # type: ignore[attr-defined]
    assert "NotImplementedError" not in source
    assert Sparsifier.__mro__ == (Sparsifier, object)


@pytest.mark.parametrize(
    ("argument", "given", "error", "message"),
    [
        ("method", Spartan, MethodError, r"is a class: write method=Spartan\(\)"),
        ("method", "spartn", MethodError, "did you mean 'spartan'"),
        ("method", 3, MethodError, "is no method"),
        ("budget", Budget, BudgetError, "neither a spartan.Budget nor a number"),
        ("budget", "0.5", BudgetError, "neither a spartan.Budget nor a number"),
        ("budget", True, BudgetError, "neither a spartan.Budget nor a number"),
        ("budget", 50, BudgetError, "density"),
        ("pattern", spartan.Block, PatternError, r"is a class: write pattern=spartan.Block\("),
        ("pattern", 4, PatternError, "is no pattern"),
        ("model", nn.Linear, PrunableError, "is no torch.nn.Module"),
        ("optimizer", torch.optim.SGD, StateError, "give the torch.optim.Optimizer"),
        ("total_steps", 10.5, spartan.SpartanError, "whole number of steps"),
        ("total_steps", None, spartan.SpartanError, "needs total_steps="),
    ],
)
def test_slips_get_one_sentence(argument: str, given: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        made(**{argument: given})
    assert "\n" not in str(raised.value)


def test_a_missing_argument_is_named() -> None:
    model = nn.Linear(8, 8)
    with pytest.raises(TypeError, match="'method', 'budget', and 'total_steps'"):
        Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[call-arg]


def test_compress_takes_a_budget_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    samples = torch.randn(64, 16)
    reports = [
        spartan.compress(model, samples, method="magnitude", allocation="global", **given)
        for given in ({"density": 0.25}, {"sparsity": 0.75}, {"budget": Budget(density=0.25)},
                      {"budget": 0.25})
    ]  # fmt: skip
    wanted = reports[0].model.state_dict()
    for report in reports:
        assert report.nonzero == round(0.25 * (16 * 32 + 32 * 4))
        assert all(torch.equal(wanted[k], v) for k, v in report.model.state_dict().items())
    with pytest.raises(BudgetError, match="not both"):
        spartan.compress(model, samples, density=0.25, budget=0.25)
