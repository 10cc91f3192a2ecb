"""Networks and calls that break naive compression."""

from __future__ import annotations

import copy
import itertools
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import spartan
from spartan import NM, Block
from spartan.errors import CalibrationError, MethodError, PrunableError
from spartan.methods.masking.fixed import Fixed
from spartan.post_training import METHODS, Distillation

QUICK = Distillation(steps=10, batch_size=16)
ALL = [name for name in METHODS if name != "fcpts-published"]


def compress(model: nn.Module, inputs: object, **options) -> spartan.CompressionReport:
    options.setdefault("distillation", QUICK)
    return spartan.compress(model, inputs, **options)


def mlp(*widths: int, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


@pytest.mark.parametrize("count", [2, 3, 19, 74])
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_batch_norms_with_few_or_odd_samples(count: int, batch: int) -> None:
    model = mlp(20, 40, 10, norm=True)
    how = Distillation(steps=6, batch_size=batch)
    report = compress(model, torch.randn(count, 20), density=0.3, distillation=how)
    assert report.nonzero == round(0.3 * 1200)


class Catching(nn.Module):
    """Swallows whatever is raised below it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            try:
                x = layer(x)
            except:  # noqa: E722
                x = x + 1
        return x


class Failing(nn.Module):
    """Fails or is interrupted at its n-th call."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(6, 6), error
        self.calls, self.last = [0], 99

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        if self.calls[0] == self.last:
            raise self.error("stop")
        return self.layer(x)

    def __deepcopy__(self, memo: dict) -> Failing:
        twin = Failing(self.error)
        twin.load_state_dict(self.state_dict())
        twin.calls, twin.last = self.calls, self.last
        return twin.eval()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("last", range(1, 12))
def test_no_thread_is_left_whenever_it_fails(error, last: int) -> None:
    threads = set(threading.enumerate())
    model = Failing(error).eval()
    model.last = last
    with pytest.raises((error, CalibrationError)):
        compress(model, torch.randn(24, 6), density=0.5, method="obs", batch_size=8)
    assert not set(threading.enumerate()) - threads


def test_no_thread_is_left_by_a_model_that_catches_everything() -> None:
    def stop(phase: str, done: int, total: int) -> None:
        raise ValueError("stop")

    threads = set(threading.enumerate())
    with pytest.raises(ValueError, match="stop"):
        compress(Catching().eval(), torch.randn(9, 6), density=0.5, method="obs", progress=stop)
    assert not set(threading.enumerate()) - threads


class Experts(nn.Module):
    """Sends each sample to the expert that its gate likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        choice = (self.gate(x) + x[:, :3]).argmax(dim=1)
        result = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = choice == i
            if chosen.any():
                result[chosen] = expert(x[chosen])
        return result


@pytest.mark.parametrize("method", ALL)
def test_routes_that_depend_on_the_data(method: str) -> None:
    torch.manual_seed(0)
    model = Experts().eval()
    report = compress(model, torch.randn(64, 8), density=0.4, method=method)
    assert report.nonzero == round(0.4 * report.numel)
    solved = [layer for layer in report.layers if layer.seconds > 0]
    assert all(layer.error < 1 for layer in solved)


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression_is_distilled_by_squared_error(outputs: int) -> None:
    torch.manual_seed(0)
    model, x = mlp(8, 64, outputs), torch.randn(400, 8)
    how = Distillation(steps=150, batch_size=64, loss="auto" if outputs == 1 else "mse")
    report = compress(model, x, density=0.4, distillation=how)
    assert report.loss > 0
    error = (report.model(x) - model(x)).square().mean() / model(x).var()
    assert error < 0.2


class InPlace(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.sub_(3.0))


@pytest.mark.parametrize("method", ["obs", "fcpts"])
def test_inputs_that_are_changed_in_place(method: str) -> None:
    inner, x = mlp(8, 16, 4), torch.randn(60, 8)
    kept = x.clone()
    ours = compress(InPlace(inner).eval(), x, density=0.5, method=method)
    assert torch.equal(x, kept)
    theirs = compress(inner, x - 3.0, density=0.5, method=method)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
@pytest.mark.parametrize("reconstruct", [None, "network"])
def test_weights_that_are_zero_already(method: str, allocation: str, reconstruct) -> None:
    """What a layer has lost is not counted as kept: the others keep it instead."""
    model = mlp(20, 40, 40, 10)
    with torch.no_grad():
        weight = model[2].weight
        weight[torch.rand_like(weight) < 0.95] = 0
    report = compress(
        model, torch.randn(80, 20), density=0.4, method=method, allocation=allocation,
        reconstruct=reconstruct,
    )  # fmt: skip
    wanted = round(0.4 * report.numel)
    if method == "fcpts" and reconstruct is None:
        assert report.nonzero <= wanted  # units that it brought back have no dense weights
    else:
        assert report.nonzero == wanted


def test_a_model_that_is_sparser_than_asked_keeps_what_it_has() -> None:
    model = mlp(20, 40, 10)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[torch.rand_like(layer.weight) < 0.9] = 0
    left = sum(int(model[i].weight.count_nonzero()) for i in (0, 2))
    report = compress(model, torch.randn(80, 20), density=0.5, method="magnitude")
    assert report.nonzero == left


@pytest.mark.parametrize("pattern", [Block(2, 2), NM(2, 4)], ids=str)
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_units_with_a_few_zeros_can_be_distilled(pattern, method: str) -> None:
    model = mlp(20, 40, 40, 12)
    with torch.no_grad():
        model[2].weight[torch.rand(40, 40) < 0.1] = 0
    report = compress(
        model, torch.randn(80, 20), density=0.5, method=method, pattern=pattern,
        reconstruct="network",
    )  # fmt: skip
    assert report.nonzero <= round(0.5 * report.numel)


@pytest.mark.parametrize("method", [*ALL, spartan.methods.Magnitude(), spartan.methods.DPF()])
@pytest.mark.parametrize("cap", [0.92, 0.95])
def test_every_method_keeps_to_the_cap(method, cap: float) -> None:
    model = mlp(100, 100, 100)
    report = compress(
        model, torch.randn(64, 100), density=0.05 if cap == 0.95 else 0.1, method=method,
        max_layer_sparsity=cap,
    )  # fmt: skip
    assert all(layer.nonzero >= round((1 - cap) * layer.numel) for layer in report.layers)
    stricter = spartan.methods.FCPTS(max_layer_sparsity=0.91)
    report = compress(model, torch.randn(64, 100), density=0.1, method=stricter)
    assert all(layer.rate <= 0.91 for layer in report.layers)


def test_gradient_modes_and_autocast_of_the_caller_do_not_matter() -> None:
    model, x = mlp(20, 40, 10), torch.randn(64, 20)
    wanted = [compress(model, x, density=0.3, method=m).model for m in ("obs", "fcpts")]
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            found = [compress(model, x, density=0.3, method=m).model for m in ("obs", "fcpts")]
        for a, b in zip(wanted, found, strict=True):
            assert all(
                torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)
            )


def test_einsum_is_a_product_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,oi->bo", x, self.layer.weight)

    report = compress(Net().eval(), torch.randn(40, 6), density=0.5, method="obs")
    assert report.layers[0].error < 1


@pytest.mark.parametrize("method", ALL)
def test_samples_that_are_not_finite_name_the_layer(method: str) -> None:
    x = torch.randn(40, 20)
    x[17, 3] = torch.nan
    with pytest.raises(CalibrationError, match="'0.weight' are NaN"):
        compress(mlp(20, 40, 10), x, density=0.5, method=method, seed=1)


@dataclass
class Answer:
    value: Tensor
    note: str = ""


class Wrapped(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(6, 4), wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.layer(x))


@pytest.mark.parametrize("method", ["obs", "fcpts"])
def test_outputs_of_all_kinds(method: str) -> None:
    for wrap in (Answer, lambda y: {"logits": y}, lambda y: (y, [y + 1]), lambda y: y[:, 0]):
        report = compress(Wrapped(wrap).eval(), torch.randn(40, 6), density=0.5, method=method)
        assert report.nonzero == 12
    for wrap in (lambda y: None, lambda y: y.argmax(dim=1), lambda y: object()):
        with pytest.raises(CalibrationError, match="no floating-point tensor"):
            compress(Wrapped(wrap).eval(), torch.randn(40, 6), density=0.5, method=method)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.index = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x + 0.1 * torch.randn_like(x))


def test_noise_buffers_and_integer_parameters() -> None:
    model, x = Noisy().eval(), torch.randn(40, 6)
    state = torch.get_rng_state()
    losses = [compress(model, x, density=0.5, seed=2).loss for _ in range(2)]
    assert losses[0] == losses[1]
    assert torch.equal(state, torch.get_rng_state())
    assert model.calls == 0
    assert compress(model, x, density=1.0).model.calls == 0


def test_what_cannot_be_distilled_is_refused() -> None:
    model, x = mlp(20, 40, 10), torch.randn(64, 20)
    for method in (spartan.methods.ConstrainedL0(), Fixed()):
        with pytest.raises(MethodError, match="cannot be used"):
            compress(model, x, density=0.5, method=method)
    with pytest.raises(MethodError, match="float16"):
        compress(copy.deepcopy(model).half(), x.half(), density=0.5)
    for options, message in (
        ({"allocation": 0.5}, "allocation="),
        ({"batch_size": 8.5}, "whole number"),
        ({"method": "best", "allocation": "erk"}, "chooses"),
        ({"method": "fcpts-published", "max_layer_sparsity": 0.9}, "knows no max_layer_sparsity"),
    ):
        with pytest.raises(MethodError, match=message):
            compress(model, x, density=0.5, **options)


def test_best_chooses_by_the_steps_there_are() -> None:
    model, x = mlp(20, 40, 10), torch.randn(64, 20)
    few = compress(model, x, density=0.3, method="best")
    assert few.settings["method"]["name"] == "sparsegpt"
    many = Distillation(steps=60, batch_size=16)
    report = compress(model, x, density=0.3, method="best", distillation=many)
    assert report.settings["method"]["name"] == "fcpts"
    assert report.settings["steps"] == 60


@pytest.mark.parametrize("shape", [(16,), (3, 8, 8)])
def test_single_samples_are_told_from_batches(shape: tuple[int, ...]) -> None:
    model: nn.Module = mlp(16, 32, 4)
    if len(shape) == 3:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    samples = [torch.randn(shape) for _ in range(12)]
    with pytest.raises(CalibrationError, match=r"torch\.stack\(samples\)"):
        compress(model, samples, density=0.5)
    assert compress(model, torch.stack(samples), density=0.5).model is not model
    with pytest.raises(CalibrationError, match="does not run"):
        compress(model, torch.randn(12, 7), density=0.5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_models_are_refused_with_the_way_on() -> None:
    scripted = torch.jit.script(mlp(16, 32, 4))
    with pytest.raises(PrunableError, match="made from"):
        compress(scripted, torch.randn(12, 16), density=0.5)


def test_finite_inputs_whose_squares_overflow_are_named_with_their_size() -> None:
    with pytest.raises(CalibrationError, match=r"e\+30.*fcpts"):
        compress(mlp(16, 32, 4), torch.randn(32, 16) * 1e30, density=0.5, method="obs")
