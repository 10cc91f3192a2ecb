"""Gates under a constraint and under a penalty."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import spartan
from spartan import Budget, Channel, Sparsifier, gates
from spartan.budgets.group_budget import GroupBudget
from spartan.errors import BudgetError, MethodError
from spartan.methods import ConstrainedL0, PenalisedL0
from spartan.methods.masking.gated import Gated, density_gradient, expected_cost
from spartan.methods.masking.gates_state import GateGroup, gates_of
from spartan.methods.masking.groups import BudgetGroup
from tests.conftest import VECTORS

FACTS: dict[str, Any] = json.loads(
    (VECTORS / "hardconcrete_vectors.json").read_text(encoding="utf-8")
)
STEPS = 40

# Most runs here are too short for that.
pytestmark = pytest.mark.filterwarnings("ignore:The gates of")


def gated(
    model: nn.Module,
    method: Gated | None = None,
    density: float = 0.5,
    steps: int = STEPS,
    lr: float = 0.05,
    **kwargs: Any,
) -> tuple[Sparsifier, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    budget = kwargs.pop("budget", None) or Budget(density=density)
    method = method or ConstrainedL0()
    return Sparsifier(model, optimizer, method, budget, steps, **kwargs), optimizer


def set_log_alpha(sparsifier: Sparsifier, *values: list[float]) -> None:
    for weight, value in zip(sparsifier.weights, values, strict=True):
        like = gates_of(weight).log_alphas
        like.copy_(torch.tensor(value, dtype=like.dtype).reshape(like.shape))
    sparsifier.run._writer.write(sparsifier.weights)


def mlp(*widths: int, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs)]
        layers += [nn.BatchNorm1d(outputs)] * norm + [nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0
) -> list[float]:
    losses = []
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(64, model[0].in_features, generator=generator)
        optimizer.zero_grad()
        loss = (model(x).sum(1) - x[:, :2].sum(1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_expected_density_agrees_with_the_vectors() -> None:
    facts = FACTS["expected_l0"]
    cases = [
        (nn.Linear(3, 4).double(), Channel(inputs=True), facts["linear_structured_input_gates"]),
        (
            nn.Conv2d(3, 2, 5, bias=False).double(),
            Channel(),
            facts["conv_structured_output_gates_nobias"],
        ),
    ]
    for layer, pattern, fact in cases:
        sparsifier, _ = gated(nn.Sequential(layer), pattern=pattern)
        set_log_alpha(sparsifier, fact["log_alpha"])
        (group,) = sparsifier.run.groups
        density = float(expected_cost(group)) / group.budget.total
        assert density == pytest.approx(fact["density"], abs=1e-12)
        active = density * layer.weight.numel()
        assert active == pytest.approx(fact["expected_active_params"], abs=1e-10)


def test_the_gradient_of_the_density_agrees_with_the_vectors() -> None:
    facts = FACTS["constraint_gradients"]
    linear, conv = nn.Linear(3, 4).double(), nn.Conv2d(3, 2, 5, bias=False).double()
    (a,) = gated(nn.Sequential(linear), pattern=Channel(inputs=True))[0].weights
    (b,) = gated(nn.Sequential(conv), pattern=Channel())[0].weights
    a.cost, b.cost = 4.0, 75.0
    together = BudgetGroup([a, b], GroupBudget((0, 1), (4.0, 75.0), 162.0, 81.0))
    alone = [
        BudgetGroup([a], GroupBudget((0,), (4.0,), 12.0, 6.0)),
        BudgetGroup([b], GroupBudget((1,), (75.0,), 150.0, 75.0)),
    ]
    for weight, log_alpha in ((a, [2.0, 0.0, -2.0]), (b, [1.0, -1.0])):
        gates_of(weight).log_alphas.copy_(torch.tensor(log_alpha))
    fact = facts["model_wise"]
    assert float(expected_cost(together)) / 162 - facts["target"] == pytest.approx(
        fact["violation"], abs=1e-12
    )
    for weight, key in ((a, "grad_log_alpha_A"), (b, "grad_log_alpha_B")):
        found = density_gradient(together, weight) * fact["multiplier"]
        expected = torch.tensor(fact[key], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    fact = facts["layer_wise"]
    for group, multiplier, violation, key in zip(
        alone, fact["multipliers"], fact["violation"],
        ("grad_log_alpha_A", "grad_log_alpha_B"), strict=True,
    ):  # fmt: skip
        density = float(expected_cost(group)) / group.budget.total
        assert density - facts["target"] == pytest.approx(violation, abs=1e-12)
        found = density_gradient(group, group.weights[0]) * multiplier
        expected = torch.tensor(fact[key], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@given(
    log_alpha=st.lists(st.floats(-8, 8), min_size=6, max_size=6),
    costs=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
)
@settings(max_examples=25)
def test_gradient_of_the_expected_cost(log_alpha: list[float], costs: tuple[float, float]) -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(2, 2)).double()
    budget = Budget(density=0.5, cost={"0.weight": costs[0], "1.weight": costs[1]})
    sparsifier, _ = gated(model, budget=budget)
    set_log_alpha(sparsifier, log_alpha[:2], log_alpha[2:])
    (group,) = sparsifier.run.groups
    leaves = [gates_of(weight).log_alphas.requires_grad_() for weight in group.weights]
    grads = torch.autograd.grad(expected_cost(group), leaves)
    for weight, grad in zip(group.weights, grads, strict=True):
        closed = density_gradient(group, weight).detach() * group.budget.total
        torch.testing.assert_close(grad, closed, rtol=0, atol=1e-10)


def test_loss_reaches_weights_and_gates_as_autograd_says() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    sparsifier, optimizer = gated(model, PenalisedL0(penalty=0.0), lr=1.0)
    (weight,) = sparsifier.weights
    theta = weight.latent.clone().requires_grad_()
    log_alpha = gates_of(weight).log_alphas.clone()
    log_alpha.uniform_(-2, 2, generator=torch.Generator().manual_seed(3))
    gates_of(weight).log_alphas.copy_(log_alpha)
    sparsifier.run._writer.write([weight])
    log_alpha.requires_grad_()
    x = torch.randn(5, 6, dtype=torch.float64)
    loss = model(x).square().sum()
    # The same draw, through autograd.
    gate = gates_of(weight).sample.gate
    y = torch.sigmoid(log_alpha / gates.TEMPERATURE)  # where u = 1/2 the gate is the median
    assert y.shape == gate.shape
    u_logit = _logit_of_draw(gate, log_alpha.detach())
    z = (torch.sigmoid((u_logit + log_alpha) / gates.TEMPERATURE) * 1.2 - 0.1).clamp(0, 1)
    inside = (gate > 0) & (gate < 1)
    z = torch.where(inside, z, gate)
    (x @ (theta * z).T).square().sum().backward()
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.grad, theta.grad)
    torch.testing.assert_close(weight.latent, (theta - theta.grad).detach())


def _logit_of_draw(gate: torch.Tensor, log_alpha: torch.Tensor) -> torch.Tensor:
    y = ((gate + 0.1) / 1.2).clamp(1e-6, 1 - 1e-6)
    return torch.logit(y) * gates.TEMPERATURE - log_alpha


def test_medians_and_purging_agree_with_the_vectors() -> None:
    fact = FACTS["purge"]
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    sparsifier, _ = gated(
        model, ConstrainedL0(keep_one=False), pattern=Channel(inputs=True),
        budget=Budget(allocation={"0": 2 / 3, "2": 0.75}),
    )  # fmt: skip
    thetas = [weight.latent.clone() for weight in sparsifier.weights]
    set_log_alpha(sparsifier, fact["log_alpha_1"], fact["log_alpha_2"])
    with pytest.warns(UserWarning, match="before the schedule"):
        sparsifier.finalize()
    for layer, theta, key in zip((model[0], model[2]), thetas, ("1", "2"), strict=True):
        median = torch.tensor(fact[f"median_{key}"], dtype=torch.float64)
        torch.testing.assert_close(layer.weight.detach(), theta * median, rtol=0, atol=1e-12)
        kept = layer.weight.any(0).nonzero().flatten().tolist()
        assert kept == fact[f"kept_inputs_{key}"]
    purged = spartan.purge(model)
    layers = [m for m in purged.modules() if isinstance(m, nn.Linear)]
    shapes = fact["purged_shapes"]
    assert [list(m.weight.shape) for m in layers] == [shapes["W1"], shapes["W2"]]
    assert [list(m.bias.shape) for m in layers] == [shapes["b1"], shapes["b2"]]
    x = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(purged(x), model(x))


@pytest.mark.parametrize("density", [0.8, 0.3, 0.05])
@pytest.mark.parametrize("width", [16, 160])
def test_gates_reach_the_target_whatever_the_size(density: float, width: int) -> None:
    """Also of a network with a hundred times the gates, in the same number of steps."""
    model = mlp(16, width, width, 4, norm=True)
    sparsifier, optimizer = gated(model, density=density, steps=120)
    train(model, optimizer, 95)
    assert sparsifier.monitor()["expected"] == pytest.approx(density, rel=0.2)
    train(model, optimizer, 25, start=95)
    sparsifier.finalize()
    units = sum(weight.units for weight in sparsifier.weights)
    kept = sum(int(weight.prunable.parameter.count_nonzero()) for weight in sparsifier.weights)
    assert kept == round(density * units)


def test_the_scale_of_the_loss_does_not_matter() -> None:
    reached = []
    for factor in (1.0, 1e4):
        model = mlp(16, 32, 4)
        sparsifier, _ = gated(model, density=0.2, steps=100)
        optimizer = sparsifier.run.steps.optimizers[0]
        for step in range(60):
            x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (factor * model(x).square().mean()).backward()
            for p in model.parameters():
                p.grad.mul_(1 / factor) if p.dim() == 1 else None
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # gates only
            optimizer.step()
        reached.append(sparsifier.monitor()["expected"])
    assert reached[0] == pytest.approx(reached[1], rel=1e-3)


@pytest.mark.parametrize("dual", ["restart", "ascent"])
def test_a_target_of_one_leaves_the_loss_alone(dual: str) -> None:
    """The multiplier never pulls gates shut: the run is that of no penalty, bit for bit."""
    losses = []
    for method in (ConstrainedL0(dual=dual, sampled=1.0), PenalisedL0(penalty=0.0)):
        model = mlp(16, 32, 4)
        _, optimizer = gated(model, method, density=1.0)
        losses.append(train(model, optimizer, 20))
    assert losses[0] == losses[1]


def test_at_a_target_of_one_a_signed_multiplier_pulls_gates_open_only() -> None:
    model = mlp(16, 32, 4)
    sparsifier, optimizer = gated(model, ConstrainedL0(dual="nupi"), density=1.0)
    for step in range(20):
        train(model, optimizer, 1)
        assert sparsifier.monitor().get("multiplier", 0.0) <= 0.0, step


def test_per_layer_constraints_hold_layer_by_layer() -> None:
    model = mlp(16, 64, 64, 4, norm=True)
    budget = Budget(allocation={"0": 0.5, "3": 0.1, "6": 0.9})
    sparsifier, optimizer = gated(model, budget=budget, steps=300)
    train(model, optimizer, 239)
    for group, density in zip(sparsifier.run.groups, (0.5, 0.1, 0.9), strict=True):
        assert group.state_as(GateGroup).expected == pytest.approx(density, abs=0.05)


def test_layers_may_be_given_nothing_or_everything() -> None:
    model = mlp(16, 32, 32, 4)
    budget = Budget(allocation={"0": 1.0, "2": 0.0, "4": 0.5})
    sparsifier, optimizer = gated(model, budget=budget)
    with pytest.warns(UserWarning, match="'2.weight'"):
        train(model, optimizer, STEPS)
    sparsifier.finalize()
    kept = [int(model[i].weight.count_nonzero()) for i in (0, 2, 4)]
    assert kept == [16 * 32, 0, 64]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_runs_are_exact(steps: int) -> None:
    model = mlp(16, 32, 4)
    sparsifier, optimizer = gated(model, steps=steps, density=0.1)
    train(model, optimizer, steps)
    sparsifier.finalize()
    assert sum(int(model[i].weight.count_nonzero()) for i in (0, 2)) == 64


def test_channels_last_weights_have_the_same_gates() -> None:
    finals = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
        model = model.to(memory_format=memory_format)
        sparsifier, optimizer = gated(model, density=0.3, steps=20)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(4, 4, 8, 8, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        sparsifier.finalize()
        finals.append(model[2].weight.detach())
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-6, atol=1e-9)


def test_flops_are_constrained_and_met() -> None:
    model = mlp(16, 64, 8)
    budget = Budget(density=0.25, cost="flops", example_input=torch.zeros(1, 16))
    sparsifier, optimizer = gated(model, budget=budget, steps=200)
    train(model, optimizer, 200)
    sparsifier.finalize()
    flops = sum(int(m.weight.count_nonzero()) for m in model if isinstance(m, nn.Linear))
    assert flops <= 0.25 * (16 * 64 + 64 * 8)
    assert flops >= 0.25 * (16 * 64 + 64 * 8) - 1


def test_evaluation_copies_and_state_dicts_see_medians() -> None:
    model = mlp(16, 32, 4)
    sparsifier, optimizer = gated(model)
    train(model, optimizer, 10)
    resting = copy.deepcopy(model.state_dict())
    x = torch.randn(8, 16)
    model.eval()
    plain = model(x)
    model.train()
    sampled = model(x)
    assert not torch.equal(plain, sampled)
    assert torch.equal(sampled, model(x))  # one draw a step
    model.eval()
    assert torch.equal(model(x), plain)
    assert all(torch.equal(resting[k], v) for k, v in model.state_dict().items())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.train()(x), plain)  # the copy is no longer sparsified
        assert torch.equal(model.eval()(x), plain)
    train(model.train(), optimizer, 1, start=10)
    model.eval()
    assert not torch.equal(model(x), plain)
    train(model.train(), optimizer, STEPS - 11, start=11)
    sparsifier.finalize()
    assert torch.equal(model.train()(x), model.eval()(x))
    assert not model._forward_pre_hooks


def test_every_process_draws_the_same_gates() -> None:
    losses = []
    for seed in (1, 2):
        model = mlp(16, 32, 4)
        _, optimizer = gated(model)
        torch.manual_seed(seed)
        losses.append(train(model, optimizer, 5))
    assert losses[0] == losses[1]
    model = mlp(16, 32, 4)
    _, optimizer = gated(model, ConstrainedL0(seed=1))
    assert train(model, optimizer, 5) != losses[0]


def test_accumulated_gradients_are_of_one_draw() -> None:
    states = []
    for parts in (1, 4):
        model = mlp(16, 32, 4)
        sparsifier, optimizer = gated(model)
        for step in range(3):
            x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            for part in x.chunk(parts):
                (model(part).square().mean() / parts).backward()
            optimizer.step()
        states.append([weight.latent.clone() for weight in sparsifier.weights])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_compiled_models_sample_too() -> None:
    model = mlp(16, 32, 4)
    _, optimizer = gated(model)
    compiled = torch.compile(model, backend="eager")
    plain = train(model, optimizer, 3)
    other = mlp(16, 32, 4)
    _, optimizer = gated(other)
    compiled = torch.compile(other, backend="eager")
    found = []
    for step in range(3):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (compiled(x).sum(1) - x[:, :2].sum(1)).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found == pytest.approx(plain, rel=1e-5)


def test_layers_that_shut_are_named_and_keep_a_unit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    sparsifier, optimizer = gated(model, density=0.05, steps=100)
    set_log_alpha(sparsifier, [2.0] * 1024, [-4.0] * 512)
    with pytest.warns(UserWarning, match=r"All gates of '2.weight' close"):
        train(model, optimizer, 100)
    sparsifier.finalize()
    assert all(int(model[i].weight.count_nonzero()) > 0 for i in (0, 2))


def test_gates_behind_which_a_norm_follows_are_named() -> None:
    model = mlp(16, 32, 4, norm=True)
    _, optimizer = gated(model, pattern=Channel())
    with pytest.warns(UserWarning, match=r"'0.weight'.*Channel\(inputs=True\)"):
        train(model, optimizer, 8)


def test_steps_without_a_draw_are_refused() -> None:
    model = mlp(16, 32, 4)
    sparsifier, optimizer = gated(model)
    before = [weight.latent.clone() for weight in sparsifier.weights]
    model.eval()
    with pytest.raises(MethodError, match="in training mode"):
        train(model, optimizer, 1)
    model.train()
    for old, weight in zip(before, sparsifier.weights, strict=True):
        assert torch.equal(old, weight.latent)
    train(model, optimizer, 1)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (ConstrainedL0, {"gate_lr": 0.0}, "gates that do not move"),
        (ConstrainedL0, {"gate_lr": math.nan}, "must be positive"),
        (ConstrainedL0, {"dual": "newton"}, "nupi"),
        (ConstrainedL0, {"dual_lr": 0.0}, "must be positive"),
        (ConstrainedL0, {"proportional": -1.0}, "0 or more"),
        (ConstrainedL0, {"warmup": 0.9}, "overlap"),
        (ConstrainedL0, {"finetune": 1.0}, "no step"),
        (PenalisedL0, {"penalty": -1.0}, "0 or more"),
    ],
)
def test_bad_settings(method: type[Gated], options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        method(**options)


@pytest.mark.parametrize("shown", [False, True], ids=["at rest", "after a training pass"])
def test_weights_written_from_outside_are_taken(shown: bool) -> None:
    model = mlp(16, 32, 4)
    sparsifier, optimizer = gated(model)
    train(model, optimizer, 3)
    weight = sparsifier.weights[0]
    x = torch.randn(8, 16)
    if shown:
        model(x)
    with torch.no_grad():
        model[0].weight.fill_(5.0)
    with pytest.warns(UserWarning, match="written outside"):
        model(x)
    assert bool((weight.latent >= 5.0 - 1e-5).all())
    expected = weight.latent * gates_of(weight).sample.gate
    torch.testing.assert_close(model[0].weight.detach(), expected)


def test_weights_scaled_from_outside_are_not_gated_twice() -> None:
    model = mlp(16, 32, 4)
    _, optimizer = gated(model)
    train(model, optimizer, STEPS - 4)
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    kept = model[0].weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with pytest.warns(UserWarning, match="written outside"):
        train(model, optimizer, 2, start=STEPS - 4)
    torch.testing.assert_close(model[0].weight.detach(), kept)


@pytest.mark.parametrize("method", [ConstrainedL0(), PenalisedL0(penalty=100.0)])
def test_finalize_ahead_of_time_is_exact(method: Gated) -> None:
    model = mlp(16, 32, 4)
    sparsifier, optimizer = gated(model, method, density=0.3, steps=100)
    train(model, optimizer, 60)
    with pytest.warns(UserWarning, match="before the schedule"):
        sparsifier.finalize()
    kept = sum(int(model[i].weight.count_nonzero()) for i in (0, 2))
    assert kept == round(0.3 * 640)


def test_a_unit_of_each_layer_is_kept_or_the_budget_refused() -> None:
    model = mlp(16, 32, 32, 4)
    budget = Budget(density=0.1, cost={"0": 100.0, "2": 1.0, "4": 1.0})
    sparsifier, optimizer = gated(model, budget=budget, pattern=Channel())
    train(model, optimizer, STEPS)
    sparsifier.finalize()
    assert all(weight.kept >= 1 for weight in sparsifier.weights)
    rows = [int(model[i].weight.any(1).sum()) for i in (0, 2, 4)]
    total = 100 * 16 * 32 + 32 * 32 + 32 * 4
    assert min(rows) >= 1
    assert 100 * 16 * rows[0] + 32 * rows[1] + 32 * rows[2] <= 0.1 * total
    model = mlp(16, 32, 32, 4)
    with pytest.raises(BudgetError, match=r"one unit of each of 3 layers .*'0.weight'"):
        gated(model, density=0.02, pattern=Channel())
    gated(model, ConstrainedL0(keep_one=False), density=0.02, pattern=Channel())


@pytest.mark.filterwarnings("ignore:All gates of")
def test_layers_without_gradients_do_not_starve_the_others() -> None:
    model = mlp(16, 32, 32, 4)
    model[2].weight.requires_grad_(False)
    sparsifier, optimizer = gated(model, density=0.2, steps=200)
    with pytest.warns(UserWarning, match="No gradient reaches '2.weight'"):
        train(model, optimizer, 200)
    sparsifier.finalize()
    assert sparsifier.monitor()["expected"] == pytest.approx(0.2, abs=0.05)
    trained = [weight for weight in sparsifier.weights if weight.name != "2.weight"]
    assert all(weight.kept / weight.units > 0.1 for weight in trained)


def test_state_dicts_after_a_training_pass_are_at_rest() -> None:
    model = mlp(16, 32, 4)
    _, optimizer = gated(model)
    train(model, optimizer, 10)
    resting = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model(torch.randn(8, 16))
    assert all(torch.equal(resting[k], v) for k, v in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:No gradient reaches")  # in the first of the two steps
def test_two_optimizers_watched_without_being_named() -> None:
    model = mlp(16, 32, 4)
    sparsifier = Sparsifier(model, None, ConstrainedL0(), Budget(density=0.5), STEPS)
    before = [gates_of(weight).log_alphas.clone() for weight in sparsifier.weights]
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.05) for i in (0, 2)]
    for _ in range(3):
        model(torch.randn(8, 16)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert sparsifier.step > 0
    for log_alpha, weight in zip(before, sparsifier.weights, strict=True):
        assert not torch.equal(log_alpha, gates_of(weight).log_alphas)


class Wrapper(nn.Module):
    """Names its model as torch's wrappers do."""

    def __init__(self, module: nn.Sequential) -> None:
        super().__init__()
        self.module = module

    def __getitem__(self, i: int) -> nn.Module:
        return self.module[i]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def test_wrappers_do_not_change_the_draws() -> None:
    losses = []
    for model in (mlp(16, 32, 4), Wrapper(mlp(16, 32, 4))):
        _, optimizer = gated(model)
        losses.append(train(model, optimizer, 5))
    assert losses[0] == losses[1]


def test_a_constraint_that_is_missed_is_told() -> None:
    model = mlp(16, 32, 4)
    sparsifier, optimizer = gated(model, ConstrainedL0(gate_lr=1e-3), density=0.1)
    with pytest.warns(UserWarning, match="makes up the difference"):
        train(model, optimizer, STEPS)
    assert sparsifier.density == 0.1
