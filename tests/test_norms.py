"""Batch-norm statistics for an evaluation while masks move."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import spartan
from spartan.errors import CalibrationError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=0.01), nn.Dropout(0.5), nn.Linear(8, 3)]
    return nn.Sequential(*layers)


def batches(count: int = 3) -> list[Tensor]:
    return list(torch.randn(count, 40, 6, generator=torch.Generator().manual_seed(1)).mul(5).add(2))


def test_inside_the_statistics_are_those_of_the_inputs() -> None:
    model = net().train()
    with spartan.recalibrated(model, batches()):
        assert not any(module.training for module in model.modules())
        norm = model[1]
        hidden = [model[0](x) for x in batches()]
        mean = torch.stack([h.mean(0) for h in hidden]).mean(0)
        variance = torch.stack([h.var(0) for h in hidden]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, variance)


@pytest.mark.parametrize("breaks", [False, True])
def test_afterwards_everything_is_as_before(breaks: bool) -> None:
    model = net().train()
    model[3].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    if breaks:
        with pytest.raises(RuntimeError), spartan.recalibrated(model, [torch.ones(4, 5)]):
            pass
    else:
        with spartan.recalibrated(model, batches()):
            model(batches()[0])
    assert [module.training for module in model.modules()] == modes
    assert model[1].momentum == 0.01
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_model_without_batch_norms_is_not_run() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)).train()
    with spartan.recalibrated(model, [torch.ones(4, 5)]):  # would not fit
        assert not model.training
    assert model.training


def test_frozen_norms_keep_their_statistics() -> None:
    model = net().train()
    model[1].eval()
    with spartan.recalibrated(model, batches()):
        assert torch.equal(model[1].running_mean, torch.zeros(8))


def test_no_batch_is_an_error() -> None:
    model = net().train()
    with pytest.raises(CalibrationError, match="no batch"), spartan.recalibrated(model, []):
        pass
    assert torch.equal(model[1].running_var, torch.ones(8))
    assert model.training


def test_gates_are_not_drawn_for_it() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = spartan.Sparsifier(model, optimizer, "constrained-l0", 0.5, 20)
    with spartan.recalibrated(model.train(), batches()):
        assert not any(weight.sampled for weight in sparsifier.weights)
