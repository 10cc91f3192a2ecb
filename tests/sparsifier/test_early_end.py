"""A run that ends early is at its budget exactly, whatever its method."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spartan import Budget, Sparsifier
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
