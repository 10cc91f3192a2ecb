"""What the sparsifier says of the model, after others have written into it or exchanged parts."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from spartan import Block, Budget, Channel, Sparsifier
from spartan.always_sparse import SparseLinear
from spartan.errors import MethodError, NonFiniteError, StateError
from spartan.methods import SET, ConstrainedL0, Magnitude, Spartan
from tests.conftest import Net, batch, train_step

STEPS = 12
WEIGHTS = ("conv.weight", "fc1.weight", "fc2.weight")


def trained(
    method: Any = "magnitude", pattern: Any = None
) -> tuple[Net, torch.optim.Optimizer, Sparsifier]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    budget = Budget(density=0.2, allocation="uniform")
    sparsifier = Sparsifier(model, optimizer, method, budget, STEPS, pattern)
    for step in range(STEPS):
        train_step(model, optimizer, step)
    return model, optimizer, sparsifier


def kept(model: nn.Module | dict[str, Any]) -> int:
    state = model if isinstance(model, dict) else model.state_dict()
    return sum(int(v.count_nonzero()) for k, v in state.items() if k.endswith(WEIGHTS))


def fill(model: Net) -> None:
    for p in model.parameters():
        p.data.copy_(torch.rand_like(p) + 0.1)


# Density and layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [None, Block(2, 2), Channel()], ids=str)
@pytest.mark.parametrize("after_the_end", [False, True])
def test_density_is_counted_in_the_parameters(pattern: Any, after_the_end: bool) -> None:
    model, _, sparsifier = trained(pattern=pattern)
    if after_the_end:
        sparsifier.finalize()
    assert sparsifier.density == pytest.approx(0.2, abs=0.07)  # channels are few
    fill(model)
    assert sparsifier.density == 1.0
    assert all(row.kept_units == row.units for row in sparsifier.layers())


def test_exchanged_parameters_have_no_density() -> None:
    model, _, sparsifier = trained()
    model.fc2 = nn.Linear(16, 8)
    for ask in (lambda: sparsifier.density, sparsifier.layers, sparsifier.state_dict):
        with pytest.raises(StateError, match="in the place of 'fc2.weight'"):
            ask()
    with pytest.raises(StateError, match="in the place of 'fc2.weight'"):
        sparsifier.finalize()
    with pytest.warns(UserWarning, match="in the place of 'fc2.weight'"):
        sparsifier.finalize(keep="model")
    assert sparsifier.finalized


# finalize ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Magnitude(), Spartan()])
def test_what_others_wrote_is_kept_or_put_back(method: Any) -> None:
    model, _, sparsifier = trained(method)
    own = copy.deepcopy(model.state_dict())
    fill(model)
    written = copy.deepcopy(model.state_dict())
    twin, _, other = trained(method)
    fill(twin)
    with pytest.raises(StateError, match="finalize.keep='model'. keeps"):
        sparsifier.finalize()
    sparsifier.finalize(keep="own")
    assert all(torch.equal(own[k], model.state_dict()[k]) for k in WEIGHTS)
    other.finalize(keep="model")
    now = twin.state_dict()
    assert kept(twin) == sum(round(0.2 * own[k].numel()) for k in WEIGHTS)
    assert all(torch.equal(now[k], torch.where(own[k] != 0, now[k], 0)) for k in WEIGHTS)
    assert all(bool((now[k][own[k] != 0] > 0.1).all()) for k in WEIGHTS)
    assert written["fc1.weight"].count_nonzero() == 2048


def test_written_before_the_budget_is_reached() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, Spartan(), 0.2, 100)
    train_step(model, optimizer, 0)
    fill(model)
    with pytest.warns(UserWarning, match="before the schedule reached the budget"):
        sparsifier.finalize(keep="model")
    assert kept(model) == round(0.2 * (288 + 2048 + 128))
    with pytest.raises(StateError, match="keep='both'; known: 'own', 'model'"):
        sparsifier.finalize(keep="both")  # type: ignore[arg-type]


def test_nan_in_what_others_wrote_is_refused() -> None:
    model, _, sparsifier = trained()
    model.fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="was written into 'fc1.weight'"):
        sparsifier.state_dict()


# Writes between steps ----------------------------------------------------------------------------


def test_a_write_through_data_is_noticed_at_any_step() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0001)
    Sparsifier(model, optimizer, Magnitude(), 0.2, 40)
    for step in range(11):  # not one of the steps at which all values are compared
        train_step(model, optimizer, step)
    fill(model)
    with pytest.warns(UserWarning, match="was written outside the optimizer since step 11"):
        train_step(model, optimizer, 11)
    assert float(model.fc1.weight[model.fc1.weight != 0].min()) > 0.09


def test_a_resized_parameter_is_refused() -> None:
    model, optimizer, _ = trained()
    model.fc2.weight.data = torch.zeros(8, 4)
    with pytest.raises(StateError, match="resized from"):
        optimizer.step()


# Copies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [None, Block(2, 2), "2:4"], ids=str)
@pytest.mark.parametrize(
    "copy_of",
    [
        copy.deepcopy,
        AveragedModel,
        torch.compile,
        nn.DataParallel,
        lambda model: copy.deepcopy(model).state_dict(),
        lambda model: AveragedModel(model).state_dict(),
    ],
)
def test_copies_are_made_exact(copy_of: Callable[[Any], Any], pattern: Any) -> None:
    model = Net()
    density = 0.5 if pattern == "2:4" else 0.2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, Magnitude(), density, STEPS, pattern)
    target = copy_of(copy.deepcopy(model))
    for step in range(STEPS):
        train_step(model, optimizer, step)
    for end in (lambda: None, sparsifier.finalize):
        end()
        assert sparsifier.project(target) is target
        state = target if isinstance(target, dict) else target.state_dict()
        for name, value in model.state_dict().items():
            (other,) = (v for k, v in state.items() if k.endswith(name))
            assert not name.endswith(WEIGHTS) or bool((other[value == 0] == 0).all())
        assert kept(state) == kept(model)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (nn.Linear(2, 2), "holds nothing as 'conv.weight'"),
        ({"conv.weight": torch.zeros(2)}, r"a tensor of shape \(2,\) as 'conv.weight'"),
        ([1, 2], "takes a model or a state dict, not a list"),
    ],
)
def test_other_things_are_not_projected(target: Any, message: str) -> None:
    _, _, sparsifier = trained()
    with pytest.raises(StateError, match=message):
        sparsifier.project(target)


# One sparsifier for a weight ---------------------------------------------------------------------


def test_the_sparsifier_made_last_governs() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = Sparsifier(model, optimizer, Magnitude(), 0.5, STEPS)
    train_step(model, optimizer, 0)
    with pytest.warns(UserWarning, match="made earlier and not finalized: that one ends here"):
        second = Sparsifier(model, optimizer, Magnitude(), 0.2, STEPS)
    assert first.finalized
    for step in range(STEPS):
        train_step(model, optimizer, step)
    second.finalize()
    assert (first.step, second.step) == (1, STEPS)
    assert kept(model) == round(0.2 * (288 + 2048 + 128))


def test_two_sparsifiers_govern_different_weights() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = Sparsifier(model, optimizer, Magnitude(), 0.5, STEPS, include="conv")
    second = Sparsifier(model, optimizer, Spartan(), 0.25, STEPS, include="fc*")
    for step in range(STEPS):
        train_step(model, optimizer, step)
    first.finalize()
    second.finalize()
    assert int(model.conv.weight.count_nonzero()) == 144
    assert kept(model) == 144 + round(0.25 * (2048 + 128))


def test_a_model_that_nobody_needs_is_freed_with_its_run() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, Spartan(), 0.5, STEPS)
    train_step(model, optimizer, 0)
    gone = [weakref.ref(one) for one in (model, sparsifier.run)]
    del model, optimizer, sparsifier
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_finalize_in_a_hook_of_the_last_step() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, Magnitude(), 0.2, STEPS)
    optimizer.register_step_post_hook(
        lambda *_: sparsifier.finalize() if sparsifier.step == STEPS else None
    )
    for step in range(STEPS):
        train_step(model, optimizer, step)
    assert sparsifier.finalized
    assert kept(model) == round(0.2 * (288 + 2048 + 128))


@pytest.mark.parametrize("part", ["dual", "mask", "own"])
def test_a_state_in_part_is_refused(part: str) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, Spartan(), 0.2, 100)
    for step in range(5):
        train_step(model, optimizer, step)
    state = copy.deepcopy(sparsifier.state_dict())
    weight = state["weights"]["fc1.weight"]
    if part == "dual":
        weight["own"][0]["dual"] = None
    else:
        del weight[part]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match="of 'fc1.weight'"):
        sparsifier.load_state_dict(state)
    with pytest.raises(StateError, match="holds no settings"):
        sparsifier.load_state_dict({"version": 4})
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    x, _ = batch(0)
    assert bool(torch.isfinite(model(x)).all())


# Innocent loops ----------------------------------------------------------------------------------


def change_memory_format(model: Net) -> None:
    model.to(memory_format=torch.channels_last)


def transpose_in_memory(model: Net) -> None:
    model.fc1.weight.data = model.fc1.weight.data.t().contiguous().t()


@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("change", [change_memory_format, transpose_in_memory])
@pytest.mark.parametrize("method", [Magnitude(), Spartan()], ids=["magnitude", "spartan"])
def test_another_order_in_memory_changes_nothing(
    method: Any, change: Callable[[Net], None], at: int
) -> None:
    finals = []
    for disturbed in (False, True):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        sparsifier = Sparsifier(model, optimizer, method, 0.2, STEPS)
        for step in range(STEPS):
            if disturbed and step == at:
                change(model)
            train_step(model, optimizer, step)
        sparsifier.finalize()
        finals.append(model.state_dict())
    for name in WEIGHTS:
        torch.testing.assert_close(finals[0][name], finals[1][name], rtol=0, atol=1e-5)
        assert torch.equal(finals[0][name] != 0, finals[1][name] != 0)


@pytest.mark.filterwarnings("ignore:The gates of", "ignore:Next to nothing")
@pytest.mark.parametrize("method", [Magnitude(), Spartan(), ConstrainedL0()], ids=repr)
def test_weights_swapped_for_an_evaluation_and_back_change_nothing(method: Any) -> None:
    finals = []
    for swaps in (False, True):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        sparsifier = Sparsifier(model, optimizer, method, 0.2, 24)
        for step in range(24):
            train_step(model, optimizer, step)
            if swaps:
                own = [p.detach().clone() for p in model.parameters()]
                for p in model.parameters():
                    p.data.mul_(0.9)
                model.eval()(batch(step)[0])
                for p, old in zip(model.parameters(), own, strict=True):
                    p.data.copy_(old)
                model.train()
        sparsifier.finalize()
        finals.append(model.state_dict())
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in WEIGHTS)


def test_roundings_on_the_way_away_and_back_are_no_writes() -> None:
    model, optimizer, sparsifier = trained(Spartan())
    latent = [weight.latent.clone() for weight in sparsifier.weights]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 / 3).mul_(3.0)
    sparsifier.state_dict()
    assert all(map(torch.equal, latent, [weight.latent for weight in sparsifier.weights]))
    sparsifier.finalize()
    assert not optimizer._optimizer_step_pre_hooks


def test_weights_perturbed_between_many_passes_raise_no_alarm() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsifier = Sparsifier(model, optimizer, Magnitude(), 0.2, STEPS)
    for step in range(STEPS):
        own = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        for half in range(2):
            for part in range(6):
                x, y = batch(100 * step + part)
                nn.functional.cross_entropy(model(x), y).backward()
            if half == 0:
                with torch.no_grad():
                    for p in model.parameters():
                        p.add_(p.grad, alpha=0.01)
                optimizer.zero_grad()
        for p, old in zip(model.parameters(), own, strict=True):
            p.data = old
        optimizer.step()
    sparsifier.finalize()
    assert kept(model) == round(0.2 * (288 + 2048 + 128))


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: "checkpoint.pt",
        lambda state: None,
        lambda state: {**state, "step": -3},
        lambda state: {**state, "step": "5"},
        lambda state: {**state, "weights": [*state["weights"].values()]},
        lambda state: {**state, "groups": None},
        lambda state: {**state, "settings": None},
        lambda state: state["weights"]["fc1.weight"]["latent"].fill_(torch.nan) is None or state,
    ],
)
def test_what_is_no_state_is_refused(damage: Callable[[Any], Any]) -> None:
    _, _, sparsifier = trained()
    state = copy.deepcopy(sparsifier.state_dict())
    with pytest.raises(StateError):
        sparsifier.load_state_dict(damage(state))
    assert sparsifier.step == STEPS


def test_a_state_may_be_loaded_in_inference_mode() -> None:
    model, optimizer, sparsifier = trained()
    state = copy.deepcopy(sparsifier.state_dict())
    with torch.inference_mode():
        sparsifier.load_state_dict(state)
    with pytest.warns(UserWarning, match="the masks stay"):
        train_step(model, optimizer, 0)
    sparsifier.finalize()


@pytest.mark.parametrize("grows", [False, True])
def test_transforms_of_functions_are_refused_where_weights_are_written(grows: bool) -> None:
    model: nn.Module = SparseLinear(8, 4, density=0.5) if grows else nn.Linear(8, 4)
    Sparsifier(model, None, SET() if grows else ConstrainedL0(), 0.5, STEPS)
    parameters = dict(model.named_parameters())

    def loss(values: Any) -> Any:
        return torch.func.functional_call(model, values, torch.ones(2, 8)).square().sum()

    with pytest.raises(MethodError, match="inside of torch.func"):
        torch.func.grad(loss)(parameters)
