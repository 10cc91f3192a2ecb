"""Spartan multiplies by soft masks where a norm follows, and nowhere else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spartan import NM, Block, Channel, Sparsifier, Unstructured, soft_topk
from spartan.errors import NonFiniteError
from spartan.methods import Spartan
from spartan.methods.masking.soft_mask import SoftMask, damp_gradients

STEPS = 20


class LayerNorm2d(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[1:])


def mlp(norm: Any) -> nn.Sequential:
    layers = [nn.Linear(12, 32), norm, nn.ReLU(), nn.Linear(32, 32), copy.deepcopy(norm)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(32, 5))


def cnn(norm: nn.Module) -> nn.Sequential:
    first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    second = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    layers = [first, norm, nn.ReLU(), second, copy.deepcopy(norm), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))


NETS: dict[str, tuple[Any, list[bool]]] = {
    "no norms": (lambda: mlp(nn.Identity()), [False, False, False]),
    "batch norms": (lambda: mlp(nn.BatchNorm1d(32)), [True, True, False]),
    "layer norms": (lambda: mlp(nn.LayerNorm(32, bias=False)), [False, False, False]),
    "images, none": (lambda: cnn(nn.Identity()), [False, False, False]),
    "images, batch norms": (lambda: cnn(nn.BatchNorm2d(8)), [True, True, False]),
    "images, layer norms": (lambda: cnn(LayerNorm2d()), [True, True, False]),
    "images, group norms": (lambda: cnn(nn.GroupNorm(2, 8)), [True, True, False]),
}


def inputs(model: nn.Sequential, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (32, 12) if isinstance(model[0], nn.Linear) else (32, 3, 8, 8)
    x = torch.randn(shape, generator=generator)
    return x, torch.randint(0, 5, (32,), generator=generator)


def train(model: nn.Sequential, optimizer: Any, steps: range, half: bool = False) -> None:
    for step in steps:
        x, y = inputs(model, step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()


def start(name: str, **options: Any) -> tuple[nn.Sequential, Any, Sparsifier]:
    torch.manual_seed(0)
    model = NETS[name][0]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    method = Spartan(**options)
    return model, optimizer, Sparsifier(model, optimizer, method, 0.3, STEPS)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", [*NETS])
def test_gradients_tell_whether_a_norm_follows(name: str, half: bool) -> None:
    model, optimizer, sparsifier = start(name)
    assert not any(row.soft for row in sparsifier.layers())  # nothing is known yet
    train(model, optimizer, range(12), half)
    # A bias between weight and norm takes the invariance of a whole layer, not of an output.
    assert [row.soft for row in sparsifier.layers()] == NETS[name][1]


def test_hard_weights_are_theta_where_kept_and_soft_ones_are_not() -> None:
    model, optimizer, sparsifier = start("batch norms")
    train(model, optimizer, range(12))
    for weight, row in zip(sparsifier.weights, sparsifier.layers(), strict=True):
        w = torch.where(weight.mask, weight.latent, 0.0)
        assert torch.equal(weight.parameter, w) is not row.soft


@pytest.mark.parametrize("stop", [3, 10, 17])
def test_a_run_that_is_resumed_decides_the_same(stop: int) -> None:
    model, optimizer, sparsifier = start("batch norms")
    train(model, optimizer, range(stop))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()))
    train(model, optimizer, range(stop, STEPS))
    other, its_optimizer, its_sparsifier = start("batch norms")
    other.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    its_sparsifier.load_state_dict(saved[2])
    train(other, its_optimizer, range(stop, STEPS))
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


@pytest.mark.parametrize("pattern", [None, Block(2, 2), NM(2, 4)])
def test_a_step_that_fails_changes_no_rule(pattern: Any) -> None:
    """The eighth gradient decides, but only once its step is done."""
    torch.manual_seed(0)
    model = mlp(nn.BatchNorm1d(32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    density = 0.5 if isinstance(pattern, NM) else 0.3
    sparsifier = Sparsifier(
        model, optimizer, Spartan(warmup=0.0), density, STEPS, pattern, exclude="6.weight"
    )
    train(model, optimizer, range(7))
    before = [weight.parameter.clone() for weight in sparsifier.weights]
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(NonFiniteError):
        train(model, optimizer, range(7, 8))
    assert all(torch.equal(w.parameter, b) for w, b in zip(sparsifier.weights, before, strict=True))
    assert not any(row.soft for row in sparsifier.layers())


def test_the_published_rule_multiplies_every_weight() -> None:
    torch.manual_seed(0)
    model = NETS["no norms"][0]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, Spartan.published(warmup=0.0), 0.3, STEPS)
    assert all(row.soft for row in sparsifier.layers())
    train(model, optimizer, range(12))
    assert all(row.soft for row in sparsifier.layers())


@pytest.mark.parametrize("pattern", [Unstructured(), Block(2, 2), Channel(), NM(2, 4)])
def test_gradients_of_what_is_pruned_of_hard_weights_are_damped(pattern: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12))
    density = 0.5 if isinstance(pattern, NM) else 0.25
    method = Spartan(beta=(3.0, 3.0), warmup=0.0)
    sparsifier = Sparsifier(model, None, method, density, 100, pattern)
    (weight,) = sparsifier.weights
    model[0].weight.grad = grad = torch.ones(12, 16)
    damp_gradients([weight])
    rows = [slice(None)] if not isinstance(pattern, NM) else range(len(weight.mask))
    beta = sparsifier.run.groups[0].state.beta
    expected = torch.zeros(weight.mask.shape, dtype=torch.float64)
    for row in rows:
        scores, mask = weight.scores()[row].double(), weight.mask[row]
        m = soft_topk(scores, int(mask.sum()), beta=beta)
        expected[row] = (m / m[mask].min()).clamp(max=1)
    assert bool((expected[~weight.mask] < 1).all())
    torch.testing.assert_close(grad, weight.spread(expected).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:No gradient is required")
def test_nothing_is_decided_once_masks_are_fixed() -> None:
    torch.manual_seed(0)
    model = NETS["batch norms"][0]()
    for parameter in model[3].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, Spartan(finetune=0.6), 0.3, STEPS)
    train(model, optimizer, range(9))  # masks are fixed from step 8 on
    for parameter in model[3].parameters():
        parameter.requires_grad_(True)
    train(model, optimizer, range(9, STEPS))
    state = sparsifier.weights[1].state_as(SoftMask)
    assert (state.gradients, state.hard) == (0, True)
    sparsifier.finalize()
