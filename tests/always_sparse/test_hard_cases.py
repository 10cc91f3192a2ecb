"""What models, optimizers and loops of users do to always-sparse layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from spartan import Budget, Sparsifier, kernels
from spartan.always_sparse import SparseConv2d, SparseLinear, convert
from spartan.errors import BudgetError, NonFiniteError, SpartanError, StateError
from spartan.methods import GSE, SET, RigL
from tests.conftest import Net, batch, train_step
from tests.kernels.test_products import SETS
from tests.methods.test_growth_contract import DENSITY, STEPS, sgd, sparse_net, sparsify

pytestmark = pytest.mark.filterwarnings("ignore:.*have no connection")

each_backend = pytest.mark.parametrize("name", ["torch", SETS[-1]])


# Layers -------------------------------------------------------------------------------------------


def test_defaults_of_the_moment_do_not_matter() -> None:
    layer = SparseLinear(40, 3000, density=0.2)
    x = torch.randn(128, 40)
    wanted = layer(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(layer(x), wanted)
        assert torch.equal(layer(x.t().contiguous().t()), wanted)
        SparseLinear(10, 10, density=0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    fresh = copy.deepcopy(layer)
    with torch.device("meta"):
        fresh(x).sum().backward()
        with pytest.raises(BudgetError, match="meta device"):
            SparseLinear(10, 10, density=0.5)


@each_backend
def test_strided_values_and_bias(name: str) -> None:
    layer = SparseLinear(30, 20, density=0.2)
    x = torch.randn(4, 30)
    values, bias = torch.randn(2, 120)[:, 0].new_tensor(0.7).expand(120), torch.ones(()).expand(20)
    with kernels.using(name):
        found = torch.func.functional_call(layer, {"values": values, "bias": bias}, (x,))
    with torch.no_grad():
        layer.values.copy_(values)
        layer.bias.copy_(bias)
    torch.testing.assert_close(found, layer(x))


def test_values_of_another_graph_are_refused() -> None:
    layer = SparseLinear(30, 20, density=0.2)
    layer.values.data = torch.ones(3)
    with pytest.raises(StateError, match="3 values and 120 connections"):
        layer(torch.randn(2, 30))


@each_backend
def test_autocast_on_every_backend(name: str) -> None:
    layer = SparseLinear(12, 12, density=0.5)
    x = torch.randn(5, 12, requires_grad=True)
    with kernels.using(name):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            y.sum().backward()
        torch.testing.assert_close(y, layer(x))


def test_no_images() -> None:
    layer = SparseConv2d(4, 6, 3, density=0.5)
    assert layer(torch.randn(0, 4, 40, 40)).shape == (0, 6, 38, 38)


def test_paddings_and_sizes_that_are_no_numbers() -> None:
    with pytest.raises(SpartanError, match="'same'"):
        SparseConv2d(4, 6, 3, padding="same", density=0.5)  # type: ignore[arg-type]
    assert SparseConv2d(4, 6, torch.tensor(3), density=0.5).kernel_size == (3, 3)  # type: ignore[arg-type]


def test_sizes_beyond_the_indices() -> None:
    with pytest.raises(BudgetError, match="int32"):
        SparseLinear(2**33, 4, density=1e-9)
    with pytest.raises(BudgetError, match="less than 2\\^31"):
        SparseLinear(2**20, 2**20, density=0.5)


def test_default_transformer_encoder_with_padding() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    with pytest.warns(UserWarning, match="stay dense"):
        model = convert(nn.TransformerEncoder(layer, 1), 0.3).eval()
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, 4] = True
    with torch.no_grad():
        assert model(torch.randn(2, 5, 16), src_key_padding_mask=mask).shape == (2, 5, 16)


def test_hooks_that_are_lost_are_told() -> None:
    model = nn.Sequential(nn.Linear(10, 10))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hooks"):
        convert(model, 0.5)


# States -------------------------------------------------------------------------------------------


def test_a_state_without_its_graph_changes_nothing_of_the_layer() -> None:
    layer, other = SparseLinear(30, 20, density=0.2), SparseLinear(30, 20, density=0.2)
    state = other.state_dict()
    del state["row_starts"]
    x, before = torch.randn(2, 30), copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(state)
    assert torch.equal(layer.values, before.values)
    assert torch.equal(layer.columns, before.columns)
    layer(x)


def test_a_damaged_state_is_refused_before_other_layers_load_it() -> None:
    model = nn.Sequential(nn.Linear(30, 30), SparseLinear(30, 20, density=0.2))
    sparsifier = Sparsifier(model, None, SET(), Budget(density=0.2), 10)
    before = copy.deepcopy(model.state_dict())
    state = {k: v + 1 for k, v in before.items()}
    with pytest.raises(StateError, match="not loaded"):
        model.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    sparsifier.finalize()
    assert not model._load_state_dict_pre_hooks


def test_another_number_of_values_forgets_the_gradient() -> None:
    layer, other = SparseLinear(30, 20, density=0.2), SparseLinear(30, 20, density=0.3)
    layer(torch.randn(2, 30)).sum().backward()
    layer.load_state_dict(other.state_dict())
    layer.zero_grad(set_to_none=False)
    layer(torch.randn(2, 30)).sum().backward()
    assert layer.values.grad.shape == (180,)


def test_loaded_in_inference_mode_it_can_still_train() -> None:
    layer, other = SparseLinear(30, 20, density=0.2), SparseLinear(30, 20, density=0.3)
    with torch.inference_mode():
        layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.values, other.values)
    assert not layer.values.is_inference()
    layer(torch.randn(2, 30)).sum().backward()
    assert layer.values.grad.shape == (180,)
    assert bool(layer.values.grad.any())


@pytest.mark.parametrize("harm", ["rounds", "order", "missing"])
def test_damaged_lists_of_pairs_change_nothing(harm: str) -> None:
    model = sparse_net()
    sparsifier = sparsify(model, sgd(model), GSE())
    state = copy.deepcopy(sparsifier.state_dict())
    state["step"] = 7
    (saved,) = state["weights"]["fc1.values"]
    if harm == "rounds":
        saved["rounds"] = saved["rounds"][:3]
    elif harm == "order":
        saved["tried"] = saved["tried"].flip(0)
    else:
        del saved["rounds"]
    with pytest.raises(StateError, match=r"'fc1.values' is no list of pairs"):
        sparsifier.load_state_dict(state)
    assert sparsifier.step == 0


# Loops --------------------------------------------------------------------------------------------


def trained(discard: Any, method: Any) -> tuple[Any, nn.Module]:
    """Train two steps, the second with an update, and `discard` something before it."""
    model = sparse_net()
    optimizer = sgd(model)
    sparsifier = sparsify(model, optimizer, method)
    train_step(model, optimizer, 0)
    discard(model, optimizer)
    x, y = batch(1)
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()  # after forward, as many loops do
    loss.backward()
    optimizer.step()
    return sparsifier.selected(), model


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("factor", [1.0, float("inf"), float("nan")])
def test_gradients_that_were_discarded_do_not_choose(set_to_none: bool, factor: float) -> None:
    def discard(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none)
        x, y = batch(77)
        # In evaluation mode norms keep their statistics.
        (nn.functional.cross_entropy(model.eval()(x), y) * factor).backward()
        if factor != 1.0:
            with pytest.raises(NonFiniteError):
                optimizer.step()
        optimizer.zero_grad(set_to_none)
        model.train()

    method = RigL(period=2, end=1.0)
    wanted, _ = trained(lambda *_: None, method)
    found, _ = trained(discard, method)
    assert all(torch.equal(wanted[name], keys) for name, keys in found.items())


def test_a_grad_scaler_that_skips() -> None:
    model = sparse_net()
    optimizer = sgd(model)
    sparsifier = sparsify(model, optimizer, RigL(period=1, end=1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = sparsifier.selected()
    for step, factor in enumerate((float("inf"), 1.0)):
        x, y = batch(step)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert sparsifier.step == step
        assert (sparsifier.churn(before) > 0) == (step == 1)
        assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_an_overwritten_input_is_noticed() -> None:
    layer = SparseLinear(30, 20, density=DENSITY)
    optimizer = sgd(layer)
    sparsify(layer, optimizer, RigL(period=1, end=1.0))
    buffer = torch.randn(30, 8)
    layer(buffer.t()).square().sum().backward()
    buffer.copy_(torch.randn(30, 8))
    with pytest.raises(StateError, match="overwritten"):
        optimizer.step()


@pytest.mark.parametrize("method", [SET(period=1, end=1.0), RigL(period=1, end=1.0)], ids=repr)
def test_layers_that_are_not_trained_keep_their_connections(method: Any) -> None:
    model = sparse_net()
    model.fc1.requires_grad_(False)
    optimizer = sgd(model)
    sparsifier = sparsify(model, optimizer, method)
    before = sparsifier.selected()
    values = model.fc1.values.detach().clone()
    for step in range(4):
        train_step(model, optimizer, step)
    assert torch.equal(sparsifier.selected()["fc1.values"], before["fc1.values"])
    assert torch.equal(model.fc1.values, values)
    assert sparsifier.churn(before) > 0

    model = sparse_net()
    head = torch.optim.SGD(model.fc2.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"'conv.values', 'fc1.values': neither trained nor grown"):
        sparsifier = sparsify(model, head, method)
    train_step(model, head, 0)
    assert sparsifier.churn(before) > 0
    assert torch.equal(sparsifier.selected()["conv.values"], before["conv.values"])


def two_optimizers(model: Net) -> list[torch.optim.Optimizer]:
    first = [*model.conv.parameters(), *model.norm.parameters()]
    second = [*model.fc1.parameters(), *model.fc2.parameters()]
    return [torch.optim.SGD(p, 0.05, momentum=0.9) for p in (first, second)]


def alternating_step(model: nn.Module, optimizers: Any, step: int) -> None:
    """One step, in which the first optimizer takes part every other time."""
    x, y = batch(step)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    for optimizer in optimizers[step % 2 :]:
        optimizer.step()


def test_state_of_every_optimizer_follows_after_a_resume() -> None:
    def start(seed: int) -> tuple[Net, Any, Any]:
        model = sparse_net(seed=seed)
        optimizers = two_optimizers(model)
        method = SET(period=1, end=1.0)
        return model, optimizers, Sparsifier(model, optimizers, method, Budget(density=0.2), STEPS)

    model, optimizers, sparsifier = start(0)
    for step in range(8):
        if step == 3:
            saved = copy.deepcopy(
                (model.state_dict(), [o.state_dict() for o in optimizers], sparsifier.state_dict())
            )
        alternating_step(model, optimizers, step)
    other, other_optimizers, resumed = start(5)
    other.load_state_dict(saved[0])
    for optimizer, state in zip(other_optimizers, saved[1], strict=True):
        optimizer.load_state_dict(state)
    resumed.load_state_dict(saved[2])
    for step in range(3, 8):
        alternating_step(other, other_optimizers, step)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_updates_that_find_no_gradient_are_told() -> None:
    model = sparse_net()
    optimizer = sgd(model)
    sparsify(model, optimizer, RigL(period=2, end=1.0))
    train_step(model, optimizer, 0)
    optimizer.zero_grad()
    for p in model.norm.parameters():  # the only ones with a gradient
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="nothing moves"):
        optimizer.step()


def test_closures_are_checked_before_the_step() -> None:
    model = sparse_net()
    optimizer = sgd(model)
    sparsifier = sparsify(model, optimizer, RigL(period=1, end=1.0))
    before = copy.deepcopy(dict(model.named_parameters()))

    def closure(factor: float) -> Any:
        optimizer.zero_grad()
        x, y = batch(0)
        loss = nn.functional.cross_entropy(model(x), y) * factor
        loss.backward()
        return loss

    with pytest.raises(NonFiniteError):
        optimizer.step(lambda: closure(float("nan")))
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    graphs = sparsifier.selected()
    optimizer.step(lambda: closure(1.0))
    assert sparsifier.churn(graphs) > 0


def test_compiled_while_connections_move() -> None:
    losses = []
    for compiled in (False, True):
        model = sparse_net()
        optimizer = sgd(model)
        sparsify(model, optimizer, RigL(period=2, end=1.0))
        run = torch.compile(model, backend="aot_eager") if compiled else model
        losses.append([train_step(run, optimizer, step) for step in range(8)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("method", [RigL(period=1), GSE(period=1, gamma=100.0)], ids=repr)
def test_dead_gradients_do_not_let_memory_order_choose(method: Any) -> None:
    torch.manual_seed(0)
    layer = SparseLinear(40, 40, density=0.1)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    sparsifier = Sparsifier(layer, optimizer, method, Budget(density=0.1), 10)
    before = sparsifier.selected()["values"]
    (layer(torch.randn(4, 40)) * 0).sum().backward()
    optimizer.step()
    now = sparsifier.selected()["values"]
    grown = now[~torch.isin(now, before)]
    assert grown.numel() >= 30
    assert len({key // 40 for key in grown.tolist()}) > 10  # of many outputs
