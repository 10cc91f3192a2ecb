"""Requests for growth that do not fit are refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import spartan
from spartan import Block, Budget, Sparsifier
from spartan.always_sparse import convert
from spartan.errors import BudgetError, MethodError, PatternError, PrunableError, ScheduleError
from spartan.methods import DSTEE, GSE, SET, RigL, Static
from tests.conftest import Net
from tests.methods.test_growth_contract import DENSITY, STEPS, sgd, sparse_net, sparsify

pytestmark = pytest.mark.filterwarnings("ignore:.*have no connection")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GSE(fraction=0), MethodError, "in \\(0, 1\\]"),
        (lambda: GSE(period=0), MethodError, "at least 1"),
        (lambda: RigL(end=2), MethodError, "between 0 and 1"),
        (lambda: GSE(sampler="grab"), MethodError, "did you mean 'grabo'"),
        (lambda: GSE(gamma=0), MethodError, "must be positive"),
        (lambda: DSTEE(exploration=-1), MethodError, "0 or positive"),
        (lambda: DSTEE(epsilon=0), MethodError, "must be positive"),
        (lambda: spartan.methods.create("static", period=3), MethodError, "has no settings"),
    ],
)
def test_bad_settings(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"budget": Budget(density=0.3)}, BudgetError, "Budget\\(density=0.2"),
        ({"budget": Budget(density=0.2, allocation="uniform")}, BudgetError, "'uniform'"),
        ({"budget": Budget(density=0.2, cost="bytes")}, BudgetError, "cost='parameters'"),
        ({"budget": Budget(density=0.2, count="all")}, BudgetError, "count='prunable'"),
        ({"pattern": Block(2, 2)}, PatternError, "single connections"),
        ({"include": "fc1"}, PrunableError, "name layers in"),
        ({"total_steps": None}, ScheduleError, "needs total_steps"),
    ],
)
def test_requests_that_do_not_fit(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = sparse_net()
    request = {"budget": Budget(density=DENSITY), "total_steps": STEPS, **settings}
    with pytest.raises(error, match=message):
        Sparsifier(model, sgd(model), GSE(), **request)


def test_lbfgs_is_refused() -> None:
    model = sparse_net()
    with pytest.raises(MethodError, match="LBFGS"):
        sparsify(model, torch.optim.LBFGS(model.parameters()), GSE())
    sparsify(model, torch.optim.LBFGS(model.parameters()), Static())


def test_a_mapping_serves_conversion_and_growth() -> None:
    allocation = {"conv.weight": 0.5, "fc1": 0.1, "fc2.weight": 0.2}
    model = convert(Net(), None, allocation)
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, SET(), Budget(allocation=allocation), 10)
    assert [share.kept for _, share in sparsifier.budgets()] == [144, 205, 26]


def test_rprop_is_refused() -> None:
    model = sparse_net()
    with pytest.raises(MethodError, match="Rprop"):
        sparsify(model, torch.optim.Rprop(model.parameters()), GSE())
