"""A run that ends early is at its budget exactly, whatever its method."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spartan
from spartan import Budget, Sparsifier
from spartan.errors import NonFiniteError
from spartan.methods import METHODS

MASKING = sorted(
    name for name, method in METHODS.items() if "masking" in method.__module__ and name != "fixed"
)


@pytest.mark.filterwarnings("ignore:finalize:UserWarning")
@pytest.mark.parametrize("left", [1, 3])
@pytest.mark.parametrize("name", MASKING)
def test_finalized_some_steps_early(name: str, left: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 15), nn.ReLU(), nn.Linear(15, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, METHODS[name](), Budget(density=0.3), 20)
    for _ in range(20 - left):
        loss = model(torch.randn(8, 10)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sparsifier.finalize()
    assert sum(int(model[i].weight.count_nonzero()) for i in (0, 2)) == round(0.3 * 225)
    assert sparsifier.at_budget


@pytest.mark.parametrize("name", ["spartan", "gse"])
def test_a_broken_gradient_of_a_bias_stops_the_step_that_it_is_in(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 15), nn.ReLU(), nn.Linear(15, 5))
    if name == "gse":
        spartan.always_sparse.convert(model, 0.5, every_unit=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    budget = Budget(density=0.5)
    sparsifier = Sparsifier(model, optimizer, METHODS[name](), budget, 20)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 10)).square().mean().backward()
        optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(8, 10)).square().mean().backward()
    assert model[0].bias.grad is not None
    model[0].bias.grad[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"shape \(15,\) that is not pruned.*step 4"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    model[0].bias.grad[3] = 0.0
    optimizer.step()
    assert sparsifier.step == 4
