"""The seam and its traps: closures, scalers, clipping, foreign writes, crashes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spartan
from spartan import Budget, Channel, Sparsifier
from spartan.errors import (
    BudgetError,
    NonFiniteError,
    PrunableError,
    ScheduleError,
    SpartanError,
    StateError,
)
from spartan.methods import DualAveraging, Fixed, Magnitude, Spartan
from tests.conftest import Net, batch, train_step

Make = Callable[..., Net]


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **options)


def attach(model: nn.Module, optimizer: Any, steps: int | None = 10, **options: Any) -> Sparsifier:
    method = options.pop("method", Spartan(warmup=0.3))
    spread = {key: options.pop(key) for key in ("allocation", "layer_floor") if key in options}
    budget = Budget(density=0.2, **spread)
    return Sparsifier(model, optimizer, method, budget, steps, **options)


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def plain_run(make_net: Make, steps: int = 10) -> Net:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer)
    for step in range(steps):
        train_step(model, optimizer, step)
    sparsifier.finalize()
    return model


def test_three_lines_and_the_model_is_sparse(make_net: Make) -> None:
    model = plain_run(make_net)
    weights = [model.conv.weight, model.fc1.weight, model.fc2.weight]
    kept = sum(int(w.count_nonzero()) for w in weights)
    assert kept == round(0.2 * sum(w.numel() for w in weights))


def test_warmup_zero_applies_the_masks_at_once(make_net: Make) -> None:
    model = make_net()
    sparsifier = attach(model, sgd(model), method=Spartan(warmup=0.0))
    total = sum(s.prunable.parameter.numel() for s in sparsifier.weights)
    nonzero = sum(int(s.prunable.parameter.count_nonzero()) for s in sparsifier.weights)
    assert nonzero == round(0.2 * total)


def test_density_one_changes_nothing(make_net: Make) -> None:
    models = [make_net(), make_net()]
    optimizers = [sgd(m) for m in models]
    Sparsifier(models[0], optimizers[0], Magnitude(), Budget(density=1.0), 10)
    for step in range(10):
        for model, optimizer in zip(models, optimizers, strict=True):
            train_step(model, optimizer, step)
    assert states_equal(*models)


def test_gradient_accumulation_equals_the_large_batch(make_net: Make) -> None:
    finals = []
    for parts in (1, 4):
        model = make_net(dtype=torch.float64).eval()  # batch statistics would differ
        optimizer = sgd(model)
        sparsifier = attach(model, optimizer)
        for step in range(10):
            x, y = batch(step, torch.float64)
            optimizer.zero_grad()
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (nn.functional.cross_entropy(model(xs), ys) / parts).backward()
            optimizer.step()
        sparsifier.finalize()
        finals.append(model.state_dict())
    for name, tensor in finals[0].items():
        torch.testing.assert_close(tensor, finals[1][name], rtol=0, atol=1e-10)


def test_clipping_acts_on_the_gradient_of_w(make_net: Make) -> None:
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier = attach(model, optimizer, method=DualAveraging(warmup=0.0))
    theta = {weight.name: weight.latent.clone() for weight in sparsifier.weights}
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    clipped = {weight.name: weight.prunable.parameter.grad.clone() for weight in sparsifier.weights}
    optimizer.step()
    for weight in sparsifier.weights:
        torch.testing.assert_close(weight.latent, theta[weight.name] - 0.05 * clipped[weight.name])


def test_closure_sees_w_and_gives_the_same_run(make_net: Make) -> None:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer)
    seen = []
    for step in range(10):
        x, y = batch(step)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            seen.append(sum(int(s.prunable.parameter.count_nonzero()) for s in sparsifier.weights))
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure) if step % 2 else optimizer.step(closure=closure)
    sparsifier.finalize()
    assert states_equal(model, plain_run(make_net))
    assert seen[-1] == round(0.2 * sum(s.prunable.parameter.numel() for s in sparsifier.weights))


def test_lbfgs_calls_the_closure_many_times(make_net: Make) -> None:
    model = make_net().eval()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    sparsifier = attach(model, optimizer, steps=4, method=Spartan(warmup=0.0))
    x, y = batch(0, size=64)
    kept = round(0.2 * sum(s.prunable.parameter.numel() for s in sparsifier.weights))
    losses: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        assert sum(int(s.prunable.parameter.count_nonzero()) for s in sparsifier.weights) == kept
        return loss

    for _ in range(4):
        optimizer.step(closure)
    sparsifier.finalize()
    assert losses[-1] < losses[0]


def test_exception_in_a_closure_leaves_the_sparse_model(make_net: Make) -> None:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer, method=Spartan(warmup=0.0))
    before = copy.deepcopy(model.state_dict())

    def closure() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    train_step(model, optimizer, 0)
    assert sparsifier.step == 1


def test_crash_inside_the_optimizer_is_healed(make_net: Make) -> None:
    class Failing(torch.optim.SGD):
        fail = True

        def step(self, closure: Any = None) -> Any:
            if self.fail:
                raise RuntimeError("crash")
            return super().step(closure)

    model = make_net()
    optimizer = Failing(model.parameters(), lr=0.1)
    sparsifier = attach(model, optimizer, method=Spartan(warmup=0.0))
    before = copy.deepcopy(model.state_dict())
    x, y = batch(0)
    nn.functional.cross_entropy(model.eval()(x), y).backward()
    with pytest.raises(RuntimeError, match="crash"):
        optimizer.step()
    sparsifier.state_dict()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    Failing.fail = False
    train_step(model, optimizer, 0)
    assert sparsifier.step == 1


@pytest.mark.parametrize("fused", [False, True])
def test_scaler_skips_change_nothing(fused: bool, make_net: Make) -> None:
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
    sparsifier = attach(model, optimizer, method=Spartan(warmup=0.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(number: int, poison: bool) -> None:
        x, y = batch(number)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * (float("inf") if poison else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()

    step(0, poison=False)
    state = copy.deepcopy(sparsifier.state_dict())
    weights = {k: v.clone() for k, v in model.named_parameters()}
    step(1, poison=True)
    after = sparsifier.state_dict()
    assert after["step"] == state["step"] == 1
    assert all(torch.equal(p, weights[k]) for k, p in model.named_parameters())
    for name, tensors in state["weights"].items():
        kept = after["weights"][name]
        (own,), (own_kept,) = tensors["own"], kept["own"]
        assert own["dual"] == own_kept["dual"]
        assert own["state"] == own_kept["state"]
        assert all(torch.equal(tensors[k], kept[k]) for k in ("latent", "mask"))
    step(2, poison=False)
    assert sparsifier.step == 2


def test_autocast_with_a_scaler_stays_exact(make_net: Make) -> None:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(10):
        x, y = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    sparsifier.finalize()
    total = sum(s.prunable.parameter.numel() for s in sparsifier.weights)
    kept = sum(int(s.prunable.parameter.count_nonzero()) for s in sparsifier.weights)
    assert kept == round(0.2 * total)


def test_two_optimizers_are_two_halves_of_one(make_net: Make) -> None:
    model = make_net()
    first = torch.optim.SGD([*model.conv.parameters(), *model.norm.parameters()], lr=0.05)
    second = torch.optim.AdamW([*model.fc1.parameters(), *model.fc2.parameters()], lr=1e-3)
    sparsifier = attach(model, [first, second], method=DualAveraging(warmup=0.3))
    for step in range(10):
        x, y = batch(step)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        first.step()
        assert sparsifier.step == step
        second.step()
        assert sparsifier.step == step + 1
    sparsifier.finalize()
    assert sparsifier.density == pytest.approx(0.2, abs=1e-3)
    assert not first._optimizer_step_post_hooks
    assert not second._optimizer_step_post_hooks


def test_parameter_without_gradient_keeps_theta_and_mask(make_net: Make) -> None:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer, method=Spartan(warmup=0.0))
    train_step(model, optimizer, 0)
    weight = sparsifier.weights[0]
    theta, mask, w = weight.latent.clone(), weight.mask.clone(), weight.prunable.parameter.clone()
    total = sum(s.kept for s in sparsifier.weights)
    for step in range(1, 5):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        model.conv.weight.grad = None
        optimizer.step()
        assert torch.equal(weight.latent, theta)
        assert torch.equal(weight.mask, mask)
        assert torch.equal(weight.prunable.parameter, w)
        assert sum(s.kept for s in sparsifier.weights) == total


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer)
    assert [s.name for s in sparsifier.weights] == ["0.weight"]
    for step in range(10):
        optimizer.zero_grad()
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).sum().backward()
        optimizer.step()
    sparsifier.finalize()
    assert model[2].weight is model[0].weight
    assert int(model[0].weight.count_nonzero()) == 13


def test_written_weights_are_adopted_with_a_warning(make_net: Make) -> None:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer, method=DualAveraging(warmup=0.0))
    with torch.no_grad():
        model.fc2.weight.fill_(0.5)
    with pytest.warns(UserWarning, match="'fc2.weight' was written outside the optimizer"):
        train_step(model, optimizer, 0)
    weight = next(s for s in sparsifier.weights if s.name == "fc2.weight")
    assert float((weight.latent - 0.5).abs().max()) < 0.1


def test_swapping_weights_and_back_is_silent(make_net: Make) -> None:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer)
    train_step(model, optimizer, 0)
    saved = copy.deepcopy(model.state_dict())
    latent = [weight.latent.clone() for weight in sparsifier.weights]
    model.load_state_dict(make_net(seed=5).state_dict())
    model.load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.run._writer.adopt(sparsifier.weights, 1)
        for weight, theta in zip(sparsifier.weights, latent, strict=True):
            assert torch.equal(weight.latent, theta)
        train_step(model, optimizer, 1)
    assert sparsifier.step == 2


def test_compiled_model_trains_the_same(make_net: Make) -> None:
    model = make_net()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer)
    for step in range(10):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(compiled(x), y).backward()
        optimizer.step()
    sparsifier.finalize()
    for name, tensor in plain_run(make_net).state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_attention_in_evaluation_uses_the_sparse_weights() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    optimizer = sgd(layer)
    sparsifier = attach(layer, optimizer, method=Spartan(warmup=0.0), allocation="uniform")
    assert "self_attn.in_proj_weight" in [s.name for s in sparsifier.weights]
    x = torch.randn(2, 5, 16)
    expected = layer(x)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_channels_last_weights(make_net: Make) -> None:
    model = make_net().to(memory_format=torch.channels_last)
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer, pattern=Channel(), allocation="uniform")
    for step in range(10):
        train_step(model, optimizer, step)
    sparsifier.finalize()
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_nonfinite_gradient_is_named_and_harmless(make_net: Make) -> None:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer)
    train_step(model, optimizer, 0)
    weights = copy.deepcopy(dict(model.named_parameters()))
    model.fc1.weight.grad[3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"gradient of 'fc1.weight' .* at step 2"):
        optimizer.step()
    assert all(torch.equal(weights[k], p) for k, p in model.named_parameters())
    assert sparsifier.step == 1


def test_step_that_explodes_is_named_and_undone(make_net: Make) -> None:
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e38)
    attach(model, optimizer, method=Magnitude(schedule="one-shot"))
    x, y = batch(0)
    nn.functional.cross_entropy(1e3 * model(x), y).backward()
    weight = model.fc2.weight.clone()
    with pytest.raises(NonFiniteError, match="Step 1: 'conv.weight'.* became NaN or infinite"):
        optimizer.step()
    assert torch.equal(model.fc2.weight, weight)


def test_too_many_steps(make_net: Make) -> None:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer, steps=2)
    train_step(model, optimizer, 0)
    train_step(model, optimizer, 1)
    masks = sparsifier.selected()
    with pytest.warns(UserWarning, match="step 3 of total_steps=2: the masks stay") as told:
        train_step(model, optimizer, 2)
    assert len(told) == 1
    train_step(model, optimizer, 3)  # is not told again
    assert sparsifier.step == 4
    assert all(torch.equal(masks[k], v) for k, v in sparsifier.selected().items())
    sparsifier.finalize()
    weights = [model.conv.weight, model.fc1.weight, model.fc2.weight]
    kept = sum(int(w.count_nonzero()) for w in weights)
    assert kept == round(0.2 * sum(w.numel() for w in weights))


def test_finalize_early_prunes_to_the_budget_with_a_warning(make_net: Make) -> None:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer, steps=100)
    train_step(model, optimizer, 0)
    with pytest.warns(UserWarning, match="before the schedule reached the budget"):
        sparsifier.finalize()
    weights = [model.conv.weight, model.fc1.weight, model.fc2.weight]
    kept = sum(int(w.count_nonzero()) for w in weights)
    assert kept == round(0.2 * sum(w.numel() for w in weights))
    sparsifier.finalize()  # once more does nothing
    train_step(model, optimizer, 1)
    with pytest.raises(StateError, match="trained or written since"):
        sparsifier.finalize()
    with pytest.raises(StateError, match="the run is over"):
        sparsifier.state_dict()


def test_load_refuses_other_settings_and_changes_nothing(make_net: Make) -> None:
    model = make_net()
    optimizer = sgd(model)
    state = attach(model, optimizer).state_dict()
    other = make_net(seed=1)
    sparsifier = attach(other, sgd(other), method=Spartan(warmup=0.1))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StateError, match="method="):
        sparsifier.load_state_dict(state)
    with pytest.raises(StateError, match="total_steps"):
        attach(other, sgd(other), steps=11).load_state_dict(state)
    small = nn.Linear(8, 8)
    tiny = attach(small, sgd(small))
    with pytest.raises(StateError):
        tiny.load_state_dict(state)
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


def test_state_survives_torch_save(make_net: Make, tmp_path: Any) -> None:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer)
    train_step(model, optimizer, 0)
    torch.save((model.state_dict(), sparsifier.state_dict()), tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = make_net(seed=4)
    resumed = attach(other, sgd(other))
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert resumed.step == 1
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    for ours, theirs in zip(sparsifier.weights, resumed.weights, strict=True):
        assert torch.equal(ours.latent, theirs.latent)
        assert torch.equal(ours.mask, theirs.mask)


def test_arguments_are_checked_before_anything_changes(make_net: Make) -> None:
    model = make_net()
    before = copy.deepcopy(model.state_dict())
    optimizer = sgd(model)
    with pytest.raises(ScheduleError, match="at least 1"):
        attach(model, optimizer, steps=0)
    with pytest.raises(StateError, match="no prunable weight"):
        attach(model, sgd(make_net(1)))
    with pytest.raises(PrunableError, match="did you mean 'fc1"):
        attach(model, optimizer, include=["fc11"])
    with torch.no_grad():
        broken = make_net()
        broken.fc1.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'fc1.weight' holds NaN"):
        attach(broken, sgd(broken))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.warns(UserWarning, match=r"No optimizer steps 'conv.weight'"):
        attach(model, torch.optim.SGD([*model.fc1.parameters(), *model.fc2.parameters()], lr=0.1))
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("explicit", [True, False])
def test_freeze_holds_the_zeros(explicit: bool, make_net: Make) -> None:
    model = plain_run(make_net)
    zeros = {k: p == 0 for k, p in model.named_parameters() if p.dim() > 1}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = spartan.freeze(model, optimizer if explicit else None)
    unrelated = make_net(seed=3)
    train_step(unrelated, sgd(unrelated), 0)
    before = copy.deepcopy(model.state_dict())
    for step in range(5):
        train_step(model, optimizer, step)
        for name, parameter in model.named_parameters():
            if name in zeros:
                assert torch.equal(parameter == 0, zeros[name])
    assert not torch.equal(before["fc1.weight"], model.fc1.weight)
    assert int(unrelated.fc1.weight.count_nonzero()) == unrelated.fc1.weight.numel()
    sparsifier.finalize()
    train_step(model, optimizer, 5)
    assert not torch.equal(model.fc1.weight == 0, zeros["fc1.weight"])


def test_freeze_refuses_a_dense_model(make_net: Make) -> None:
    with pytest.raises(SpartanError, match="no zeros|has a zero"):
        spartan.freeze(make_net())


def test_a_layer_that_dies_is_named_once(make_net: Make) -> None:
    model = make_net()
    with torch.no_grad():
        model.conv.weight.mul_(1e-6)
        model.fc2.weight.mul_(1e-6)
    optimizer = sgd(model)
    with pytest.warns(UserWarning, match=r"Nothing is kept of 'conv.weight', 'fc2.weight'"):
        attach(model, optimizer, method=Magnitude(schedule="one-shot"), layer_floor=0)


def test_parameter_groups_may_be_added_later(make_net: Make) -> None:
    model = make_net()
    optimizer = torch.optim.SGD(model.fc1.parameters(), lr=0.05)
    with pytest.warns(UserWarning, match="No optimizer steps 'conv.weight', 'fc2.weight'"):
        sparsifier = attach(model, optimizer)
    train_step(model, optimizer, 0)
    optimizer.add_param_group({"params": [*model.conv.parameters(), *model.fc2.parameters()]})
    before = sparsifier.weights[0].latent.clone()
    for step in range(1, 10):
        train_step(model, optimizer, step)
    sparsifier.finalize()
    assert not torch.equal(before, model.conv.weight)
    kept = sum(int(s.prunable.parameter.count_nonzero()) for s in sparsifier.weights)
    assert kept == round(0.2 * sum(s.prunable.parameter.numel() for s in sparsifier.weights))


def test_mixed_precisions_share_one_budget() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8).double()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = attach(model, optimizer, method=Spartan(warmup=0.0))
    assert sum(weight.kept for weight in sparsifier.weights) == round(0.2 * 128)
    for layer in model.values():
        layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    assert sum(weight.kept for weight in sparsifier.weights) == round(0.2 * 128)


def test_model_used_after_a_crash_is_sparse_again(make_net: Make) -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("crash")

    model = make_net().eval()
    optimizer = Failing(model.parameters(), lr=0.1)
    attach(model, optimizer, method=Spartan(warmup=0.0))
    before = copy.deepcopy(model.state_dict())
    x, y = batch(0)
    expected = model(x)
    for use in (model.state_dict, lambda: model(x)):
        nn.functional.cross_entropy(model(x), y).backward()
        with pytest.raises(RuntimeError, match="crash"):
            optimizer.step()
        assert int((model.fc1.weight == 0).sum()) == 0  # θ, until somebody looks
        use()
        assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    assert torch.equal(model(x), expected)
    assert not model._forward_pre_hooks
    assert not model._state_dict_pre_hooks


def test_finalize_does_not_overwrite_what_others_loaded(make_net: Make) -> None:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer, steps=2)
    best = copy.deepcopy(model.state_dict())
    train_step(model, optimizer, 0)
    train_step(model, optimizer, 1)
    model.load_state_dict(best)
    with pytest.raises(StateError, match=r"finalize\(keep='model'\) keeps what the model holds"):
        sparsifier.finalize()
    assert torch.equal(model.fc1.weight, best["fc1.weight"])


def test_written_nan_is_refused(make_net: Make) -> None:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer)
    train_step(model, optimizer, 0)
    with torch.no_grad():
        model.fc1.weight[0, 0] = float("nan")
    model.fc1.weight.grad = torch.zeros_like(model.fc1.weight)
    with pytest.raises(NonFiniteError, match="was written into 'fc1.weight' after step 1"):
        optimizer.step()
    assert bool(torch.isfinite(sparsifier.weights[1].latent).all())


def test_optimizers_may_step_in_any_order(make_net: Make) -> None:
    model = make_net()
    weights = torch.optim.SGD([p for p in model.parameters() if p.dim() > 1], lr=0.05)
    biases = torch.optim.SGD([p for p in model.parameters() if p.dim() == 1], lr=0.05)
    sparsifier = attach(model, [weights, biases])
    for step in range(10):
        x, y = batch(step)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        biases.step()
        weights.step()
    assert sparsifier.step == 10
    first = torch.optim.SGD(model.conv.parameters(), lr=0.05)
    second = torch.optim.SGD([*model.fc1.parameters(), *model.fc2.parameters()], lr=0.05)
    sparsifier.finalize()
    sparsifier = attach(model, [first, second], steps=3)
    for _ in range(3):
        second.step()
        first.step()
    assert sparsifier.step == 3
    sparsifier.finalize()


def test_methods_with_a_schedule_need_the_number_of_steps(make_net: Make) -> None:
    model = make_net()
    with pytest.raises(ScheduleError, match="needs total_steps"):
        attach(model, sgd(model), steps=None)


def test_fixed_refuses_a_model_denser_than_the_budget(make_net: Make) -> None:
    model = make_net()
    with pytest.raises(BudgetError, match="holds the zeros that are there"):
        attach(model, sgd(model), steps=None, method=Fixed())


def test_load_refuses_other_costs(make_net: Make) -> None:
    costs = {"conv": 1.0, "fc1": 2.0, "fc2": 3.0}
    states = []
    for order in (costs, dict(zip(costs, reversed(costs.values()), strict=True))):
        model = make_net()
        budget = Budget(density=0.2, cost=order)
        states.append(Sparsifier(model, sgd(model), Spartan(), budget, 10))
    with pytest.raises(StateError, match="budgets="):
        states[0].load_state_dict(states[1].state_dict())


def test_weights_in_no_optimizer_keep_mask_and_values(make_net: Make) -> None:
    model = make_net()
    optimizer = torch.optim.SGD([*model.fc1.parameters(), *model.fc2.parameters()], lr=0.05)
    with pytest.warns(UserWarning, match="No optimizer steps 'conv.weight'"):
        sparsifier = attach(model, optimizer, method=Spartan(warmup=0.0))
    mask = sparsifier.weights[0].mask.clone()
    for step in range(10):
        train_step(model, optimizer, step)
        assert torch.equal(sparsifier.weights[0].mask, mask)
    sparsifier.finalize()
    kept = sum(int(s.prunable.parameter.count_nonzero()) for s in sparsifier.weights)
    assert kept == round(0.2 * sum(s.prunable.parameter.numel() for s in sparsifier.weights))


def test_a_state_is_loaded_in_place_of_a_broken_step(make_net: Make) -> None:
    class Failing(torch.optim.SGD):
        broken = False

        def step(self, closure: Any = None) -> None:
            super().step(closure)
            if self.broken:
                raise RuntimeError("out of memory")

    model = make_net()
    optimizer = Failing(model.parameters(), lr=1.0)
    sparsifier = attach(model, optimizer)
    state, weights = copy.deepcopy((sparsifier.state_dict(), model.state_dict()))
    optimizer.broken = True
    with pytest.raises(RuntimeError, match="out of memory"):
        train_step(model, optimizer, 0)
    sparsifier.load_state_dict(state)
    for weight in sparsifier.weights:
        assert torch.equal(weight.latent, state["weights"][weight.name]["latent"])
        assert torch.equal(weight.prunable.parameter, weights[weight.name])


def test_a_run_goes_back_from_fixed_masks_to_moving_ones(make_net: Make) -> None:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer)
    saved = copy.deepcopy((sparsifier.state_dict(), optimizer.state_dict(), model.state_dict()))
    losses = []
    for _ in range(2):
        model.load_state_dict(saved[2])
        optimizer.load_state_dict(saved[1])
        sparsifier.load_state_dict(saved[0])
        losses.append([train_step(model, optimizer, step) for step in range(10)])
        optimizer.state.clear()
    assert losses[0] == losses[1]


def test_a_stored_soft_mask_of_another_shape_is_refused(make_net: Make) -> None:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer)
    for step in range(9):
        train_step(model, optimizer, step)
    state = copy.deepcopy(sparsifier.state_dict())
    state["weights"]["fc1.weight"]["own"][0]["state"]["soft"] = torch.ones(3)
    with pytest.raises(StateError, match=r"\(3,\) float32 as soft of 'fc1.weight'"):
        sparsifier.load_state_dict(state)


def test_units_that_are_read_before_they_are_written_are_the_new_ones(make_net: Make) -> None:
    class Halved(Magnitude):
        def materialize(self, weight: Any) -> Tensor:
            return torch.where(weight.spread(weight.mask), weight.theta * 0.5, 0.0)

    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer, method=Halved(schedule="one-shot"))
    assert sparsifier.density == pytest.approx(0.2, abs=1e-3)
    train_step(model, optimizer, 0)
    sparsifier.finalize()
    for weight in sparsifier.weights:
        assert int(weight.prunable.parameter.count_nonzero()) == weight.kept


def test_no_hook_is_left_after_closures_that_raise(make_net: Make) -> None:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer)

    def closure() -> float:
        raise RuntimeError("no data")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="no data"):
            optimizer.step(closure)
    with pytest.warns(UserWarning, match="finalize"):
        sparsifier.finalize()
    assert not model._forward_pre_hooks
    assert not model._state_dict_pre_hooks


def test_weights_of_two_precisions_share_a_budget_exactly() -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        model = nn.ModuleList([nn.Linear(50, 40), nn.Linear(40, 50).double()])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        budget = Budget(density=0.3, cost={"0": 1.0, "1": 3.0})
        sparsifier = Sparsifier(model, optimizer, Spartan(warmup=0.0), budget, 10)
        first, second = (weight.kept for weight in sparsifier.weights)
        assert 0.3 * 8000 - 3 < first + 3 * second <= 0.3 * 8000


def test_tiny_weights_stay_finite(make_net: Make) -> None:
    model = make_net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-39)
    sparsifier = attach(model, sgd(model), method=Spartan(warmup=0.0))
    assert sparsifier.density == pytest.approx(0.2, abs=1e-3)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("settings"), "no settings"),
        (lambda state: state.update(groups=()), "0 groups"),
        (lambda state: state["weights"]["fc1.weight"].update(mask=None), "None as mask"),
        (
            lambda state: state["weights"]["fc1.weight"]["own"][0].update(dual=[1.0]),
            "three numbers",
        ),
        (lambda state: state["weights"]["fc1.weight"]["own"][0].pop("active"), "no active"),
        (lambda state: state["groups"][0].update(colour=1.0), "'colour'"),
        (
            lambda state: state["weights"]["fc1.weight"]["own"][0]["state"].update(rate=1.0),
            "'rate'",
        ),
    ],
)
def test_damaged_states_change_nothing(
    damage: Callable[[Any], Any], message: str, make_net: Make
) -> None:
    model = make_net()
    optimizer = sgd(model)
    sparsifier = attach(model, optimizer)
    state = copy.deepcopy(sparsifier.state_dict())
    train_step(model, optimizer, 0)
    before = copy.deepcopy(sparsifier.state_dict())
    damage(state)
    with pytest.raises(StateError, match=message):
        sparsifier.load_state_dict(state)
    assert sparsifier.step == 1
    for weight in sparsifier.weights:
        assert torch.equal(weight.latent, before["weights"][weight.name]["latent"])


def test_an_interrupted_write_is_finished(make_net: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, undisturbed = make_net(), make_net()
    method = Magnitude(schedule="one-shot", begin=0.2)
    pairs = []
    for net in (model, undisturbed):
        optimizer = sgd(net)
        pairs.append((optimizer, attach(net, optimizer, method=method)))
        train_step(net, optimizer, 0)
    sparsifier = pairs[0][1]
    write = Magnitude.write
    interrupts = iter([True])

    def interrupted(self: Magnitude, weights: Any) -> None:
        if next(interrupts, False):
            write(self, weights[:1])
            raise KeyboardInterrupt
        write(self, weights)

    monkeypatch.setattr(Magnitude, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_step(model, pairs[0][0], 1)
    assert sparsifier.step == 2
    train_step(undisturbed, pairs[1][0], 1)
    assert states_equal(model, undisturbed)
    assert sparsifier.density == pytest.approx(0.2, abs=1e-3)


def test_kept_counts_masks_that_are_edited_in_place(make_net: Make) -> None:
    model = make_net()
    sparsifier = attach(model, sgd(model))
    weight = sparsifier.weights[0]
    assert weight.kept > 0
    weight.mask.fill_(False)
    assert weight.kept == 0
