"""FCPTS: rates learn from the task, whatever the scale of the weights; and its published form."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from spartan import Budget, Sparsifier
from spartan.errors import BudgetError, MethodError
from spartan.methods import FCPTS, PublishedFCPTS
from spartan.methods.masking.fcpts import LearnedRate
from spartan.methods.masking.fcpts_published import LearnedThreshold, slope
from tests.conftest import batch, train_step


def attach(model: nn.Module, method, density: float = 0.2, steps: int = 20, lr: float = 0.05):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return optimizer, Sparsifier(model, optimizer, method, Budget(density=density), steps)


def rates(sparsifier: Sparsifier) -> dict[str, float]:
    return {w.name: w.state_as(LearnedRate).rate for w in sparsifier.weights}


def test_the_task_reaches_the_rates(make_net) -> None:
    found = []
    for step_size in (0.0, 0.5):
        optimizer, sparsifier = attach(make_net(), FCPTS(rate_step=step_size))
        begun = rates(sparsifier)
        for step in range(10):
            train_step(sparsifier.model, optimizer, step)
        found.append((begun, rates(sparsifier)))
    (fixed, same), (begun, moved) = found
    assert fixed == begun
    assert same == pytest.approx(fixed, abs=1e-6)
    assert max(abs(moved[k] - begun[k]) for k in moved) > 0.03


def test_the_scale_of_the_loss_does_not_matter(make_net) -> None:
    found = []
    for scale in (1.0, 1024.0):
        model = make_net()
        optimizer, sparsifier = attach(model, FCPTS(rate_step=0.3), lr=0.05 / scale)
        for step in range(10):
            x, y = batch(step)
            optimizer.zero_grad()
            (scale * nn.functional.cross_entropy(model(x), y)).backward()
            optimizer.step()
        found.append(rates(sparsifier))
    assert found[0] == pytest.approx(found[1], abs=1e-3)


class TwoHalves(nn.Module):
    """Two layers of one shape, of which the loss looks at the first more."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(16, 40, bias=False), nn.Linear(16, 40, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 10 * self.loud(x).square().mean() + self.quiet(x).square().mean()


def test_a_layer_that_matters_more_keeps_more() -> None:
    torch.manual_seed(0)
    model = TwoHalves()
    dense = [w.detach().clone() for w in model.parameters()]
    optimizer, sparsifier = attach(model, FCPTS(rate_step=0.1, ramp=0.2), 0.3, 80, lr=1e-4)
    for step in range(80):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = sum(
            weight * ((layer.weight - w) @ x.T).square().mean()
            for weight, layer, w in zip((10, 1), (model.loud, model.quiet), dense, strict=True)
        )
        loss.backward()
        optimizer.step()
    loud, quiet = (row.density for row in sparsifier.layers())
    assert loud > 1.3 * quiet
    assert sum(row.kept for row in sparsifier.layers()) == round(0.3 * 1280)


@pytest.mark.parametrize("factor", [0.125, 64.0])
def test_the_scale_of_a_layer_does_not_matter(make_net, factor: float) -> None:
    """The weights before a norm may be scaled: masks and rates stay what they are."""
    found = []
    for scale in (1.0, factor):
        model = make_net()
        model.norm.eps = 1e-20
        with torch.no_grad():
            model.conv.weight.mul_(scale)
            model.conv.bias.zero_()
        # Of a scaled weight before a norm, steps of scale² are the same steps.
        groups = [
            {"params": [model.conv.weight], "lr": 0.05 * scale**2},
            {"params": [p for n, p in model.named_parameters() if n != "conv.weight"]},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.05)
        sparsifier = Sparsifier(model, optimizer, FCPTS(rate_step=0.1), Budget(density=0.3), 10)
        for step in range(10):
            train_step(model, optimizer, step)
        found.append((sparsifier.selected(), rates(sparsifier)))
    (masks, ours), (scaled_masks, theirs) = found
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert all((masks[k] == scaled_masks[k]).float().mean() > 0.99 for k in masks)


def test_the_kept_part_of_a_normalised_layer_has_no_gradient_along_itself(make_net) -> None:
    """Euler: with a norm in training mode after it, the sum of G · w over kept weights is 0."""
    model = make_net().train()
    model.norm.eps = 1e-20
    _, sparsifier = attach(model, FCPTS(ramp=0.0), 0.4)
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    weight = model.conv.weight
    along = (weight.grad * weight).sum().abs()
    assert along < 1e-5 * (weight.grad * weight).abs().sum()
    theta = sparsifier.run.groups[0].weights[0].latent
    assert (weight.grad * theta).sum().abs() > 100 * along  # the pruned part has


def test_pruned_weights_come_back_and_masks_end_fixed(make_net) -> None:
    optimizer, sparsifier = attach(make_net(), FCPTS(ramp=0.2, finetune=0.3), steps=40, lr=0.3)
    masks = []
    for step in range(40):
        train_step(sparsifier.model, optimizer, step)
        masks.append(sparsifier.selected())
    returned = [(b[k] & ~a[k]).any() for a, b in itertools.pairwise(masks[10:]) for k in a]
    assert any(returned)
    assert all(torch.equal(masks[29][k], masks[39][k]) for k in masks[0])


def test_settings_are_checked(make_net) -> None:
    for bad in (
        {"ramp": 0.9, "finetune": 0.2},
        {"shell": 0.0},
        {"memory": 1.0},
        {"rate_step": -1.0},
    ):
        with pytest.raises(MethodError):
            FCPTS(**bad)
    with pytest.raises(BudgetError, match="smallest reachable density"):
        attach(make_net(), FCPTS(), density=0.001)


# As published -----------------------------------------------------------------------------------


def test_the_bridge_has_the_slope_of_the_count() -> None:
    weights = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 0.05
    for t in (0.01, 0.03, 0.06, 0.1):
        counted = ((weights.abs() < 1.1 * t).sum() - (weights.abs() < 0.9 * t).sum()) / (
            0.2 * t * len(weights)
        )
        assert slope(weights, t) == pytest.approx(float(counted), rel=0.1)
    assert slope(weights, 1.0) == 0.0
    places = torch.linspace(0, float(weights.abs().max()), 2001)[:-1].tolist()
    total = sum(slope(weights, t) for t in places) * (places[1] - places[0])
    assert total == pytest.approx(1.0, abs=0.01)


def test_the_published_gradients_are_the_straight_through_ones(make_net) -> None:
    """θ moves as autograd says it should, with the mask's derivative replaced by 1/2."""
    model = make_net()
    method = PublishedFCPTS(penalty=0.0, momentum=0.0, lr=0.5)
    optimizer, sparsifier = attach(model, method, 0.3, 50, lr=0.0)
    weight = next(s for s in sparsifier.run.groups[0].weights if s.name == "fc1.weight")
    state = weight.state_as(LearnedThreshold)
    before, w = state.theta, weight.latent.clone()
    theta = torch.tensor(before, dtype=torch.float64, requires_grad=True)
    x, y = batch(0)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    grad = model.fc1.weight.grad.clone()
    z = w.double().abs() - torch.sigmoid(theta)
    mask = 0.5 * z + ((z > 0).double() - 0.5 * z).detach()  # forward the step, backward 1/2
    (grad.double() * mask * w.double()).sum().backward()
    optimizer.step()
    assert state.theta == pytest.approx(before - 0.5 * float(theta.grad), rel=1e-6)
    wanted = grad * ((w.abs() > torch.sigmoid(torch.tensor(before))) + 0.5 * w.abs())
    torch.testing.assert_close(model.fc1.weight.grad, wanted)


def test_the_published_penalty_alone_stays_about_the_rate(make_net) -> None:
    optimizer, sparsifier = attach(make_net(), PublishedFCPTS(penalty=1.0, lr=0.05), 0.3, 60, 0.01)
    for step in range(59):
        train_step(sparsifier.model, optimizer, step)
    assert abs(sparsifier.density - 0.3) > 0  # not held
    assert abs(sparsifier.density - 0.3) < 0.1
    train_step(sparsifier.model, optimizer, 59)
    assert sum(row.kept for row in sparsifier.layers()) == round(
        0.3 * sum(row.numel for row in sparsifier.layers())
    )


def test_the_published_form_says_what_it_is_not_for(make_net) -> None:
    optimizer = torch.optim.SGD(make_net().parameters(), lr=0.1)
    model = make_net()
    with pytest.raises(BudgetError, match="global"):
        Sparsifier(model, None, PublishedFCPTS(), Budget(density=0.3, allocation="erk"), 10)
    with pytest.raises(MethodError):
        PublishedFCPTS(lr=0.0)
    del optimizer
