"""What a compression promises, whatever the method, the allocation and the network."""

from __future__ import annotations

import copy
import itertools
import types
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import spartan
from spartan import NM, Block, Channel, Unstructured
from spartan.errors import (
    BudgetError,
    CalibrationError,
    MethodError,
    NonFiniteError,
    PatternError,
    PrunableError,
    SpartanError,
)
from spartan.post_training import METHODS, Distillation
from spartan.post_training.allocation import ALLOCATIONS
from spartan.weights.prunable import find_prunable
from tests.conftest import Net

QUICK = Distillation(steps=12, batch_size=16)
LAYERWISE = [name for name in METHODS if not name.startswith("fcpts")]
PATTERNS = [Unstructured(), Block(2, 4), Block(4, 1), NM(2, 4)]


def samples(count: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def net(make_net) -> Net:
    return make_net().eval()


def compress(model: nn.Module, inputs: object = None, **options) -> spartan.CompressionReport:
    options.setdefault("distillation", QUICK)
    return spartan.compress(model, samples() if inputs is None else inputs, **options)


def nonzeros(model: nn.Module) -> int:
    return sum(int(w.parameter.count_nonzero()) for w in find_prunable(model))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(
        a.state_dict().values(), b.state_dict().values(), strict=True))  # fmt: skip


# Exactness --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reconstruct", [None, "layer", "network"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("method", [*LAYERWISE, "fcpts"])
def test_every_method_with_every_allocation_is_exact(net, method, allocation, reconstruct) -> None:
    before = copy.deepcopy(net)
    report = compress(
        net, density=0.23, method=method, allocation=allocation, reconstruct=reconstruct
    )
    total = sum(w.numel for w in find_prunable(net))
    assert nonzeros(report.model) == report.nonzero == round(Fraction("0.23") * total)
    assert all(layer.nonzero >= 1 for layer in report.layers)
    assert report.sparsity == pytest.approx(0.77, abs=1e-3)
    assert same(net, before)
    assert report.model is not net
    assert torch.isfinite(report.model(samples(3))).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("method", [*LAYERWISE, "fcpts"])
@pytest.mark.parametrize("reconstruct", ["layer", "network"])
def test_every_method_with_every_pattern_is_exact(net, method, pattern, reconstruct) -> None:
    report = compress(net, density=0.5, method=method, pattern=pattern, reconstruct=reconstruct)
    for layer, weight in zip(report.layers, find_prunable(report.model), strict=True):
        units = pattern.unit_shape(weight)
        kept = weight.parameter.detach() != 0
        if isinstance(pattern, NM):
            rows = kept.movedim(1, -1).reshape(-1, 4)
            assert (rows.sum(dim=1) == 2).all()
        else:
            assert layer.nonzero == layer.kept_units * pattern.unit_numel(weight)
            assert layer.units == torch.Size(units).numel()
    units = sum(layer.units for layer in report.layers)
    assert sum(layer.kept_units for layer in report.layers) == round(0.5 * units)


@pytest.mark.filterwarnings("ignore:N(othing|ext to nothing) is kept")
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 100.0])
def test_the_rate_is_met_whatever_the_penalty(net, sparsity, seed, penalty) -> None:
    method = spartan.methods.PublishedFCPTS(penalty=penalty)
    report = compress(net, sparsity=sparsity, method=method, seed=seed)
    total = report.numel
    assert total - report.nonzero == total - round((1 - Fraction(str(sparsity))) * total)


def test_densities_may_be_given(net) -> None:
    wished = {"conv.weight": 0.9, "fc1.weight": 0.1, "fc2.weight": 0.5}
    report = compress(net, density=0.22, method="magnitude", allocation=wished)
    assert report.nonzero == round(Fraction("0.22") * report.numel)
    found = [layer.density for layer in report.layers]
    assert found == pytest.approx(list(wished.values()), abs=0.05)


def test_other_methods_of_training_can_be_used(net) -> None:
    report = compress(net, density=0.1, method=spartan.methods.Magnitude(), allocation="erk")
    assert report.nonzero == round(Fraction("0.1") * report.numel)


@pytest.mark.parametrize("method", list(METHODS))
def test_density_one_changes_nothing(net, method) -> None:
    report = compress(net, density=1.0, method=method)
    assert same(report.model, net)
    assert report.model is not net
    assert report.loss == 0.0


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_costs_in_flops_stay_within_the_budget(net, allocation) -> None:
    report = compress(net, density=0.3, method="magnitude", allocation=allocation, cost="flops")
    flops = [(3 * 3 * 4 * 8) * 16, 128 * 16, 16 * 8]  # a convolution at 16 places, two matrices
    each = [f / layer.numel for f, layer in zip(flops, report.layers, strict=True)]
    spent = sum(layer.nonzero * f for layer, f in zip(report.layers, each, strict=True))
    allowed = 0.3 * sum(flops)
    assert spent <= allowed * (1 + 1e-9)
    assert allowed < spent + max(each)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_no_layer_exceeds_the_cap(net, allocation) -> None:
    report = compress(
        net, sparsity=0.8, method="magnitude", allocation=allocation, max_layer_sparsity=0.85
    )
    assert all(layer.rate <= 0.85 for layer in report.layers)
    assert report.nonzero == round(Fraction("0.2") * report.numel)


def test_fcpts_keeps_to_the_cap(net) -> None:
    report = compress(net, sparsity=0.8, max_layer_sparsity=0.85)
    assert all(layer.rate <= 0.85 for layer in report.layers)


# What is left alone -----------------------------------------------------------------------------


def test_inplace_writes_into_the_model(net) -> None:
    parameters = list(net.parameters())
    report = compress(net, density=0.2, method="obs", inplace=True)
    assert report.model is net
    assert nonzeros(net) == report.nonzero
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_and_gradients_are_as_before(net, training) -> None:
    net.train(training)
    net.fc1.weight.requires_grad_(False)
    for method in ("sparsegpt", "fcpts"):
        report = compress(net, density=0.3, method=method)
        assert report.model.training is training
        assert not report.model.fc1.weight.requires_grad
        assert report.model.fc2.weight.requires_grad
        assert not any(m._forward_pre_hooks for m in report.model.modules())


def test_an_interruption_leaves_the_model_and_no_thread(net) -> None:
    import threading

    before, threads = copy.deepcopy(net), set(threading.enumerate())

    def stop(phase: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    for method in ("obs", "fcpts"):
        with pytest.raises(KeyboardInterrupt):
            compress(net, density=0.2, method=method, inplace=True, progress=stop)
        assert same(net, before)
        assert not set(threading.enumerate()) - threads
        assert all(p.requires_grad for p in net.parameters())


def test_progress_is_told(net) -> None:
    seen: dict[str, list[int]] = {}

    def tick(phase: str, done: int, total: int) -> None:
        seen.setdefault(phase, []).append(done)
        assert done <= total

    compress(
        net, density=0.2, method="obs", allocation="curves", reconstruct="network", progress=tick
    )
    assert seen["curves"] == seen["layers"] == [1, 2, 3]
    assert seen["distillation"] == list(range(1, QUICK.steps + 1))


@pytest.mark.parametrize("method", ["fcpts", "obs", "sparsegpt"])
def test_the_seed_decides_the_result(net, method) -> None:
    options = {"density": 0.2, "method": method, "reconstruct": "network"}
    first = compress(net, seed=3, **options)
    torch.manual_seed(99)  # what the caller drew does not matter
    state = torch.get_rng_state()
    assert same(first.model, compress(net, seed=3, **options).model)
    assert torch.equal(state, torch.get_rng_state())
    assert not same(first.model, compress(net, seed=4, **options).model)


# Calibration data -------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(3, 8)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return torch.relu(self.a(left)) + scale * self.b(right)


def test_calibration_may_come_in_any_form(net) -> None:
    x = samples(40)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, torch.zeros(40, dtype=torch.long)), batch_size=7
    )
    reports = [
        compress(net, inputs, density=0.3, method="obs")
        for inputs in (x, [x], list(x.split(9)), loader, iter(x.split(13)))
    ]
    assert all(same(reports[0].model, other.model) for other in reports)


def test_several_arguments_and_dicts() -> None:
    model, left, right = TwoInputs().eval(), torch.randn(30, 6), torch.randn(30, 3)
    labels = torch.zeros(30)
    reports = [
        compress(model, inputs, density=0.5, method="sparsegpt")
        for inputs in (
            [(left, right)],
            {"left": left, "right": right},
            [{"left": left[:10], "right": right[:10], "labels": labels[:10]},
             {"left": left[10:], "right": right[10:], "labels": labels[10:]}],
        )
    ]  # fmt: skip
    assert all(same(reports[0].model, other.model) for other in reports)


def test_samples_of_several_shapes() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    inputs = [torch.randn(5, 3, 6), torch.randn(6, 7, 6), torch.randn(4, 3, 6)]
    report = compress(model, inputs, density=0.4, reconstruct="network", method="obs")
    assert report.samples == (13, 2)
    assert report.nonzero == round(0.4 * (48 + 32))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "no calibration sample"),
        (torch.randn(0, 4, 4, 4), "no calibration sample"),
        (torch.randn(1, 4, 4, 4), "at least 2"),
        (torch.randn(20, 4, 4), "does not run"),
        (torch.randn(20, 3, 4, 4), "does not run"),
        (3, "are int"),
        (["text"], "without a tensor"),
        ([torch.tensor(1.0)], "along their first dimension"),
        ([(torch.randn(4, 4, 4, 4), torch.randn(5))], None),  # what forward does not take
        (torch.full((20, 4, 4, 4), torch.nan), "'conv.weight' are NaN"),
        (torch.full((20, 4, 4, 4), torch.inf), "'conv.weight' are NaN"),
    ],
)
def test_bad_calibration_is_refused(net, inputs, message) -> None:
    if message is None:
        compress(net, inputs, density=0.5, method="magnitude")
        return
    before = copy.deepcopy(net)
    with pytest.raises(CalibrationError, match=message):
        compress(net, inputs, density=0.2, method="obs")
    assert same(net, before)


def test_too_few_samples_say_how_many_are_needed() -> None:
    model = nn.Sequential(nn.Linear(400, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    with pytest.raises(CalibrationError, match=r"'0.weight' has 400 inputs, and 9 .* at least 51"):
        compress(model, torch.randn(10, 400), density=0.5, method="obs")
    compress(model, torch.randn(64, 400), density=0.5, method="obs")


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(6, 10), nn.Linear(6, 5)

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:
        return self.spare(x) if spare else self.used(x)


def test_unreached_weights_are_named_and_treated_as_asked() -> None:
    model, x = Unreached().eval(), torch.randn(32, 6)
    for method in ("obs", "fcpts"):
        with pytest.raises(CalibrationError, match="reaches 'spare.weight'"):
            compress(model, x, density=0.5, method=method)
        left = compress(model, x, density=0.5, method=method, unreached="dense")
        assert torch.equal(left.model.spare.weight, model.spare.weight)
        assert left.nonzero == 30
        assert left.unreached == ["spare.weight"]
        pruned = compress(
            model, x, density=0.5, method=method, unreached="magnitude", allocation="uniform"
        )
        kept = pruned.model.spare.weight != 0
        assert (pruned.nonzero, int(kept.sum())) == (45, 15)
        assert torch.equal(pruned.model.spare.weight[kept], model.spare.weight[kept])
        assert model.spare.weight[kept].abs().min() >= model.spare.weight[~kept].abs().max()


# Requests that make no sense --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, BudgetError, "Give a density"),
        ({"density": 0.5, "sparsity": 0.5}, BudgetError, "not both"),
        ({"density": 0.0}, BudgetError, "must lie"),
        ({"density": 1.5}, BudgetError, "must lie"),
        ({"density": 0.0005}, BudgetError, "smallest reachable density is 0.0012"),
        ({"sparsity": 0.9, "max_layer_sparsity": 0.5}, BudgetError, "smallest reachable"),
        ({"density": 0.3, "method": "obd"}, MethodError, "did you mean 'obs'"),
        ({"density": 0.3, "method": 3}, MethodError, "not a method"),
        ({"density": 0.3, "allocation": "ekr"}, MethodError, "did you mean 'erk'"),
        ({"density": 0.3, "allocation": {"conv.weight": 0.2}}, MethodError, "no density for 'fc1"),
        ({"density": 0.3, "allocation": {"fc3.weight": 0.2}}, MethodError, "did you mean 'fc"),
        ({"density": 0.3, "reconstruct": "block"}, MethodError, "reconstruct="),
        ({"density": 0.3, "cost": "bytes"}, MethodError, "cost="),
        ({"density": 0.3, "minutes": 0}, MethodError, "minutes="),
        ({"density": 0.3, "held_out": 1.0}, MethodError, "held_out="),
        ({"density": 0.3, "unreached": "prune"}, MethodError, "unreached="),
        ({"density": 0.3, "pattern": NM(2, 4)}, BudgetError, "2:4"),
        ({"density": 0.3, "pattern": Block(3, 3)}, PatternError, "do not divide"),
        ({"density": 0.3, "pattern": Channel()}, PatternError, "not by channel"),
        ({"density": 0.3, "exclude": "*"}, PrunableError, "Nothing to prune"),
        ({"density": 0.3, "method": "fcpts-published", "allocation": "erk"}, MethodError, "learns"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused(net, options, error, message) -> None:
    with pytest.raises(error, match=message):
        compress(net, **options)


def test_the_published_form_has_one_pattern(net) -> None:
    with pytest.raises(PatternError, match="one by one"):
        compress(net, density=0.5, method="fcpts-published", pattern=Block(2, 1))


def test_models_that_cannot_be_compressed(net) -> None:
    with pytest.raises(PrunableError, match="Nothing to prune"):
        compress(nn.Sequential(nn.ReLU()), torch.randn(4, 3), density=0.5)
    with torch.no_grad():
        net.fc1.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"fc1\.weight"):
        compress(net, density=0.5)
    sparse = spartan.always_sparse.convert(nn.Sequential(nn.Linear(8, 8)), 0.5)
    with pytest.raises(PrunableError, match="to_dense"):
        compress(sparse, torch.randn(8, 8), density=0.5)


def test_distillation_settings_are_checked() -> None:
    for bad in ({"steps": 0}, {"lr": 0.0}, {"temperature": 0.0}, {"loss": "l1"}, {"batch_size": 0}):
        with pytest.raises(MethodError):
            Distillation(**bad)


def test_a_loss_that_is_not_finite_is_told(net) -> None:
    def spoil(x: Tensor, generator: torch.Generator) -> Tensor:
        return x * torch.nan

    with pytest.raises(SpartanError, match="step 1"):
        compress(net, density=0.5, distillation=Distillation(steps=5, augment=spoil))


# Networks of all kinds --------------------------------------------------------------------------


class Block2d(nn.Module):
    """Residual, with grouped, depthwise, dilated and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + torch.relu(self.depthwise(torch.relu(self.grouped(x))))
        return self.head(self.up(x).mean(dim=(2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.embed.weight
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.again(torch.relu(self.embed(x)))))


NETWORKS = {
    "convolutions": (Block2d, (40, 3, 6, 6)),
    "tied": (Tied, (40, 6)),
    "transformer": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        ),
        (40, 5, 8),
    ),
    "recurrent use": (lambda: Recurrent(), (40, 4, 6)),
}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.state = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 8)
        for step in x.unbind(1):
            h = torch.tanh(self.inputs(step) + self.state(h))
        return h


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", [*LAYERWISE, "fcpts"])
def test_networks_of_all_kinds(name, method) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    report = compress(model, x, density=0.5, method=method, reconstruct="network")
    assert report.nonzero == nonzeros(report.model) == round(0.5 * report.numel)
    if name == "tied":
        assert report.model.again.weight is report.model.embed.weight
    wanted, ours = model(x), report.model(x)
    assert (ours - wanted).square().mean() < wanted.var()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(make_net, dtype) -> None:
    net = make_net(dtype=dtype).eval()
    for method in ("obs", "fcpts"):
        report = compress(net, samples().to(dtype), density=0.25, method=method)
        assert report.nonzero == nonzeros(report.model) == round(0.25 * report.numel)
        assert {p.dtype for p in report.model.parameters()} == {dtype}


# Quality ----------------------------------------------------------------------------------------


def learned_net() -> tuple[nn.Module, Tensor]:
    """A network whose layers matter: it was fitted to a task with few important inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 6)
    )
    x = torch.randn(600, 32)
    y = (x[:, :6] * x[:, 6:12]).argmax(dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), x


def test_reconstruction_helps_in_this_order() -> None:
    model, x = learned_net()
    how = Distillation(steps=60, batch_size=64)
    losses = {
        (method, reconstruct): compress(
            model, x, density=0.3, method=method, allocation="erk", reconstruct=reconstruct,
            distillation=how,
        ).loss
        for method, reconstruct in itertools.product(
            ("magnitude", "obs"), (None, "layer", "network")
        )
    }  # fmt: skip
    for method in ("magnitude", "obs"):
        assert losses[method, "network"] < losses[method, "layer"]
    assert losses["magnitude", "layer"] < losses["magnitude", None]
    assert losses["obs", "layer"] < losses["magnitude", "layer"]
    assert losses["obs", None] == losses["obs", "layer"]


def test_more_density_never_hurts_much() -> None:
    model, x = learned_net()
    losses = [compress(model, x, density=d, method="obs").loss for d in (0.1, 0.3, 0.6, 0.9)]
    assert losses == sorted(losses, reverse=True)


def test_a_time_sets_the_steps(net, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of which every look takes a hundredth of a second, whatever the machine does."""
    looks = itertools.count()
    clock = types.SimpleNamespace(perf_counter=lambda: next(looks) / 100)
    monkeypatch.setattr("spartan.post_training.phases.time", clock)
    steps = [
        compress(net, density=0.3, minutes=minutes).settings["steps"] for minutes in (0.005, 0.05)
    ]
    assert steps[1] > 3 * steps[0]
    assert QUICK.steps not in steps
