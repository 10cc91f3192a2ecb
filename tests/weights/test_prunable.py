"""Which parameters are prunable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from spartan.errors import NonFiniteError, PrunableError
from spartan.weights.coverage import coverage_of, say_coverage
from spartan.weights.maskable import check_maskable
from spartan.weights.prunable import NameFilter, Prunable, find_prunable


class Conv1D(nn.Module):
    """Stands in for the Hugging Face layer of this name: weight stored (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.conv1 = nn.Conv1d(4, 4, 3)
        self.conv3 = nn.Conv3d(4, 4, 3, groups=2)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.deconv = nn.ConvTranspose2d(4, 6, 3)
        self.grouped_deconv = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.same = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        self.gpt = Conv1D(6, 8)
        self.norm = nn.LayerNorm(8)
        self.rnn = nn.LSTM(4, 4)
        self.head = nn.Linear(8, 10)
        self.head.weight = self.embedding.weight


DEFAULT = [
    "conv1.weight", "conv3.weight", "depthwise.weight", "deconv.weight", "same.in_proj_weight",
    "same.out_proj.weight", "cross.q_proj_weight", "cross.k_proj_weight", "cross.v_proj_weight",
    "cross.out_proj.weight", "gpt.weight",
]  # fmt: skip


def names(include: NameFilter | None = None, exclude: NameFilter | None = None) -> list[str]:
    return [w.name for w in find_prunable(Zoo(), include, exclude)]


def test_default_choice_and_layouts() -> None:
    found = {w.name: w for w in find_prunable(Zoo())}
    assert sorted(found) == sorted(DEFAULT)
    assert [n for n, w in found.items() if w.input_first] == ["deconv.weight", "gpt.weight"]
    assert found["gpt.weight"].oriented_shape == (6, 8)


def test_include_and_exclude() -> None:
    assert names(include="conv1") == ["conv1.weight"]
    assert names(include=["conv*"]) == ["conv1.weight", "conv3.weight"]
    assert names(include="cross") == [n for n in DEFAULT if n.startswith("cross")]
    assert names(include=lambda name, p: p.dim() == 3) == ["conv1.weight"]
    assert "gpt.weight" not in names(exclude=["gpt", "cross.*"])
    assert names(exclude=lambda name, p: p.dim() < 5) == ["conv3.weight"]


def test_full_names_add_what_is_not_prunable_by_default() -> None:
    assert names(include=["embedding.weight"]) == ["embedding.weight"]
    assert names(include=["head.weight"]) == ["embedding.weight"]  # tied: one parameter
    assert names(include=["rnn.weight_hh_l0", "conv1"]) == ["conv1.weight", "rnn.weight_hh_l0"]


def test_prefix_means_a_module_and_not_a_beginning() -> None:
    model = nn.ModuleDict({"enc": nn.Linear(4, 4), "encoder": nn.Linear(4, 4)})
    assert [w.name for w in find_prunable(model, include="enc")] == ["enc.weight"]


def test_a_bare_layer_and_subclasses() -> None:
    class MyLinear(nn.Linear):
        pass

    assert [w.name for w in find_prunable(nn.Linear(3, 3))] == ["weight"]
    assert [w.name for w in find_prunable(MyLinear(3, 3))] == ["weight"]


def test_refusals() -> None:
    with pytest.raises(PrunableError, match="did you mean 'conv1"):
        names(include="convv1")
    with pytest.raises(PrunableError, match="'norm' adds nothing: no floating-point matrix"):
        names(include="norm")
    with pytest.raises(PrunableError, match="Nothing to prune"):
        find_prunable(nn.LayerNorm(4))
    with pytest.raises(PrunableError, match="has no shape yet"):
        find_prunable(nn.LazyLinear(4))


def test_names_of_modules_add_what_is_not_prunable_by_default() -> None:
    assert names(include=["rnn"]) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert names(include=["rnn.weight*", "conv1"])[0] == "conv1.weight"
    (weight,) = find_prunable(nn.Sequential(nn.Bilinear(3, 4, 5)), include="0")
    assert weight.oriented_shape == (5, 3, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"include": ["conv1", "norm"]}, "include='norm' adds nothing"),
        ({"include": ["conv1", "embedding"]}, "to prune it .'embedding.weight'."),
        ({"exclude": ["conv1", "norm"]}, "exclude='norm' removes nothing"),
        ({"exclude": "embedding"}, "would not be pruned without it"),
        ({"include": "conv1", "exclude": "conv3"}, "exclude='conv3' removes nothing"),
    ],
)
def test_words_that_change_nothing_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(PrunableError, match=message):
        names(**words)


class Experts(nn.Module):
    """Matrices stacked in one parameter, as libraries of language models hold them."""

    def __init__(self, is_transposed: bool | None = None) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 8, 4))
        if is_transposed is not None:
            self.is_transposed = is_transposed


@pytest.mark.parametrize(
    ("said", "include", "shape"),
    [
        (None, ["up:out,in"], (8, 4)),
        (None, ["up:in,out"], (4, 8)),
        (False, ["up"], (8, 4)),
        (True, ["up"], (4, 8)),
        (True, ["up:out,in"], (8, 4)),  # who writes it knows better
    ],
)
def test_layouts_of_experts(said: bool | None, include: list[str], shape: tuple[int, int]) -> None:
    (weight,) = find_prunable(Experts(said), include)
    assert weight.stacked
    assert weight.layout_known
    assert weight.oriented_shape == shape
    assert weight.experts == 2


def test_wrappers_do_not_show_in_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        assert [w.name for w in find_prunable(wrapped, exclude="1")] == ["0.weight"]


def test_factors_of_lora_are_pruned_where_they_are_named() -> None:
    model = nn.ModuleDict(
        {"base": nn.Linear(8, 8), "lora_A": nn.Linear(8, 2), "lora_B": nn.Linear(2, 8)}
    )
    assert [w.name for w in find_prunable(model)] == ["base.weight"]
    assert [w.name for w in find_prunable(model, "lora_A")] == ["lora_A.weight"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weights_that_are_computed_are_left_out_by_name() -> None:
    layers = [nn.Linear(4, 4) for _ in range(5)]
    nn.utils.parametrizations.weight_norm(layers[1])
    nn.utils.weight_norm(layers[2])
    nn.utils.spectral_norm(layers[3])
    prune.random_unstructured(layers[4], "weight", 0.5)
    model = nn.Sequential(*layers)
    weights = find_prunable(model)
    assert [w.name for w in weights] == ["0.weight"]
    coverage = coverage_of(model, weights)
    assert coverage.computed == (
        "'1' (parametrized by WeightNorm)",
        "'2' (under a weight or spectral norm)",
        "'3' (under a weight or spectral norm)",
        "'4' (masked by torch.nn.utils.prune)",
    )
    with pytest.warns(UserWarning, match="Left out, and dense: '1' .parametrized by WeightNorm"):
        say_coverage(coverage, decided=False, stacklevel=2)
    for word in ("1.parametrizations.weight.original1", "2.weight_v", "4.weight_orig"):
        with pytest.raises(PrunableError, match="zeros in it are not zeros of the weight"):
            find_prunable(model, include=[word])
    with pytest.raises(PrunableError, match="'2.weight_g' is under a weight or spectral norm"):
        find_prunable(model, include=["0", "2"])


def test_coverage_counts_matrices() -> None:
    model = Zoo()
    coverage = coverage_of(model, find_prunable(model))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    assert coverage.total == sum(p.numel() for p in matrices)
    assert coverage.prunable == sum(w.numel for w in find_prunable(model))
    assert coverage.total == coverage.prunable + sum(count for _, _, count in coverage.left_out)
    assert "left out 'rnn' (LSTM, 128)" in str(coverage)
    assert not coverage.low


def test_a_budget_of_less_than_half_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8))
    coverage = coverage_of(model, find_prunable(model))
    with pytest.warns(UserWarning, match=r"prunable 64 of 864 weights: left out '0' .Embedding"):
        say_coverage(coverage, decided=False, stacklevel=2)
    with caplog.at_level("INFO", "spartan"):
        say_coverage(coverage, decided=True, stacklevel=2)
    assert "prunable 64 of 864 weights" in caplog.text


def _sparse_layout() -> nn.Parameter:
    return nn.Parameter(torch.eye(4).to_sparse())


def _made_for_inference() -> nn.Parameter:
    with torch.inference_mode():
        return nn.Parameter(torch.ones(4, 4))


class _Quantised(Tensor):
    """Stands in for the tensors of quantisation libraries."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Parameter(torch.ones(4, 4, device="meta")), "'w': on the meta device"),
        (_sparse_layout, "the layout is torch.sparse_coo"),
        (_made_for_inference, "inference_mode"),
        (lambda: nn.Parameter(torch.ones(4, 4).as_subclass(_Quantised)), "quantised or wrapped"),
        (lambda: nn.Parameter(torch.ones(1, 4).expand(4, 4)), "share memory"),
    ],
)
def test_parameters_that_cannot_be_masked(make: Callable[[], nn.Parameter], message: str) -> None:
    with pytest.raises(PrunableError, match=message):
        check_maskable([Prunable("w", make())])


def test_nan_is_refused_by_name() -> None:
    with pytest.raises(NonFiniteError, match="'w' holds NaN"):
        check_maskable([Prunable("w", nn.Parameter(torch.full((2, 2), torch.nan)))])
