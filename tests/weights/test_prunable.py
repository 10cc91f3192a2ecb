"""Which parameters are prunable."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spartan.errors import PrunableError
from spartan.weights.prunable import NameFilter, find_prunable


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
