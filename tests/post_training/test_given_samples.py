"""What is calibrated on is what was given; weights with other uses; norms; the time asked."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from spartan import compress
from spartan.errors import CalibrationError
from spartan.post_training import Distillation
from spartan.post_training.grams import LayerProblem


class Masked(nn.Module):
    """Mean of embedded tokens, of those that a mask leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.table(ids)
        return self.head((h if mask is None else h * mask[..., None]).mean(1))


class TimeFirst(nn.Module):
    """Reads sequences with time first."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0])


def test_a_bare_tuple_is_one_call() -> None:
    ids, mask = torch.randint(0, 9, (100, 7)), torch.ones(100, 7)
    report = compress(Masked(), (ids, mask), density=0.5, method="wanda")
    assert sum(report.samples) == 100


def test_a_bare_tuple_with_labels_is_one_call() -> None:
    report = compress(nn.Linear(64, 4), (torch.randn(80, 64), torch.zeros(80)), density=0.5)
    assert sum(report.samples) == 80


def test_a_split_tensor_is_batches() -> None:
    report = compress(nn.Linear(64, 4), torch.randn(80, 64).split(20), density=0.5, method="obs")
    assert sum(report.samples) == 80


@pytest.mark.parametrize("method", ["wanda", "fcpts"])
@pytest.mark.parametrize(
    ("model", "samples", "told"),
    [
        (nn.Linear(64, 4), list(torch.randn(256, 64)), "one sample"),
        (Masked(), list(torch.randint(0, 9, (64, 10))), "one sample"),
        (TimeFirst(), [torch.randn(10, 64, 6) for _ in range(3)], "depends on the others"),
        (TimeFirst(), [torch.randn(10, 6) for _ in range(64)], "depends on the others"),
    ],
    ids=["rows", "sequences of tokens", "time first", "sequences"],
)
def test_what_are_no_samples_is_refused(
    model: nn.Module, samples: Any, told: str, method: str
) -> None:
    with pytest.raises(CalibrationError, match=told):
        compress(model, samples, density=0.5, method=method)


class WithState(nn.Module):
    """Returns the last state of each layer besides, (layers, samples, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(6, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.cell(x)
        return self.head(y), h


class Towers(nn.Module):
    """Compares all samples with each other, (samples, samples)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) @ self.other(x).T


class Besides(nn.Module):
    """Returns things besides that no sample has: constants, and a mean over the batch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.head, self.size = nn.Linear(6, 3), size

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.head(x)
        return y, torch.arange(1.0, self.size + 1), y.mean() * torch.ones(self.size)


class Boxes(nn.Module):
    """Returns a list of what is found in each sample, (found, 4)."""

    def __init__(self, found: int) -> None:
        super().__init__()
        self.head, self.found = nn.Linear(6, 4 * found), found

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{"boxes": y.view(self.found, 4)} for y in self.head(x)]


def answers_of_any_form() -> list[tuple[nn.Module, Tensor]]:
    x = torch.randn(64, 6)
    others = [*map(Besides, (2, 3, 6)), *map(Boxes, (2, 3, 6))]
    return [(WithState(), torch.randn(64, 5, 6)), (Towers(), x), *((model, x) for model in others)]


@pytest.mark.parametrize(("model", "x"), answers_of_any_form(), ids=lambda v: type(v).__name__)
def test_answers_may_be_of_any_form(model: nn.Module, x: Tensor) -> None:
    how = Distillation(steps=2, loss="mse", batch_size=8)
    report = compress(model.eval(), x, density=0.5, distillation=how)
    assert report.nonzero == round(0.5 * report.numel)


def test_a_tuple_that_may_be_batches_or_arguments_is_refused() -> None:
    ids = torch.randint(0, 9, (64, 7))
    with pytest.raises(CalibrationError, match="list of the batches, or a dict"):
        compress(Masked(), ids.chunk(2), density=0.5, method="wanda")
    batches = tuple(torch.randn(8, 3, size, size) for size in (32, 24, 40))
    report = compress(nn.Conv2d(3, 8, 3), batches, density=0.5, method="wanda")
    assert sum(report.samples) == 24


def test_models_that_draw_are_not_refused() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(len(x), 4)

    assert compress(Noisy(12, 4), torch.randn(64, 12), density=0.5, method="obs").nonzero == 24


class Autoencoder(nn.Module):
    """Decodes with the transposed matrix of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.bias = nn.Linear(32, 24), nn.Parameter(torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T, self.bias)


class Table(nn.Module):
    """Looks up in the matrix of its head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 9, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.embedding(ids, self.head.weight).mean(1))


class Scaled(nn.Module):
    """Its norm is a part of what it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) / self.layer.weight.square().sum().sqrt()


OTHER_USES = [
    (Autoencoder(), torch.randn(200, 32), "encoder.weight"),
    (Table(), torch.randint(0, 9, (200, 5)), "head.weight"),
    (Scaled(), torch.randn(200, 16), "layer.weight"),
]


@pytest.mark.parametrize("method", ["obs", "sparsegpt", "wanda", "alps"])
@pytest.mark.parametrize(("model", "x", "name"), OTHER_USES, ids=["transposed", "table", "scale"])
def test_weights_with_other_uses_are_named(
    model: nn.Module, x: Tensor, name: str, method: str
) -> None:
    with pytest.warns(UserWarning, match=f"Also used in another way .*'{name}'"):
        report = compress(model, x, density=0.5, method=method, allocation="uniform")
    weight = dict(model.named_parameters())[name]
    kept = dict(report.model.named_parameters())[name]
    largest = weight.abs() >= weight.abs().flatten().kthvalue(weight.numel() // 2 + 1).values
    assert torch.equal(kept, weight * largest)


def test_looking_at_a_weight_is_no_use_of_it(recwarn: pytest.WarningsRecorder) -> None:
    class Careful(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert not torch.isnan(self.weight).any()
            return super().forward(x) + torch.zeros_like(self.weight)[0, 0] + x.new_zeros(4)

    compress(Careful(12, 4), torch.randn(64, 12), density=0.5, method="obs")
    assert not [w for w in recwarn if "another way" in str(w.message)]


def test_a_network_that_is_trained_sees_all_uses(recwarn: pytest.WarningsRecorder) -> None:
    model, x, _ = OTHER_USES[0]
    compress(model, x, density=0.5, distillation=Distillation(steps=20))
    assert not [w for w in recwarn if "another way" in str(w.message)]


def digits() -> tuple[nn.Module, Tensor]:
    """A network with batch norms, trained for a moment on images of digits, and the images."""
    torch.manual_seed(0)
    found = load_digits()
    x, y = torch.tensor(found.data / 16).float(), torch.tensor(found.target)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((64, 64, 64, 64)):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        batch = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model.eval(), x


def test_batch_norms_are_refreshed_where_that_helps() -> None:
    model, x = digits()
    report = compress(model, x, density=0.3, method="magnitude")
    stale = copy.deepcopy(report.model)
    for norm, old in zip(stale, model, strict=True):
        if isinstance(norm, nn.BatchNorm1d):
            assert not torch.equal(norm.running_mean, old.running_mean)
            norm.load_state_dict(old.state_dict())
    how = Distillation()
    with torch.no_grad():
        assert how.divergence(report.model(x), model(x)) < how.divergence(stale(x), model(x))


@pytest.mark.parametrize("method", ["obs", "wanda", "sparsegpt", "alps", "magnitude"])
def test_layers_then_a_distillation_in_the_time_asked(method: str) -> None:
    model, x = digits()
    report = compress(
        model, x[:256], density=0.3, method=method, reconstruct="network", minutes=0.02
    )
    assert report.nonzero == round(0.3 * report.numel)
    assert report.settings["steps"] >= 1


@pytest.mark.parametrize(("samples", "batch_size"), [(65, 1), (67, 2), (3, 64)])
def test_norms_need_no_batches_of_two(samples: int, batch_size: int) -> None:
    model, x = digits()
    compress(model, x[:samples], density=0.5, method="magnitude", batch_size=batch_size)


def test_norms_of_a_form_with_one_sample() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    for seed in range(3):
        given = [torch.randn(40, 3, 16, 16), torch.randn(1, 3, 20, 20)]
        compress(model, given, density=0.5, method="wanda", seed=seed)


class Routed(nn.Module):
    """A first entry above zero goes through an expert of its own, before what all go through."""

    def __init__(self) -> None:
        super().__init__()
        self.usual, self.rare = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rare = x[:, 0] > 0
        h = torch.empty_like(x)
        h[~rare] = self.usual(x[~rare])
        if rare.any():
            h[rare] = self.rare(x[rare])
        return self.head(h.relu())


def test_an_expert_that_only_held_out_samples_reach_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 8)
    x[:, 0] = -x[:, 0].abs()
    held_out = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:50]
    x[held_out[0], 0] = 1.0
    seen: dict[str, int] = {}
    earned = LayerProblem.earned

    def noted(problem: LayerProblem, matrix: Tensor, change: Tensor) -> float:
        assert problem.held_out is not None
        seen[problem.weight.name] = problem.held_out.positions
        return earned(problem, matrix, change)

    monkeypatch.setattr(LayerProblem, "earned", noted)
    compress(Routed(), x, density=0.5, method="sparsegpt", unreached="magnitude", batch_size=10)
    assert seen["head.weight"] == 50
