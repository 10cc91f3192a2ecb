"""Patterns: pooling and spreading are adjoint, for every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spartan import NM, Block, Channel, Unstructured
from spartan.errors import PatternError
from spartan.kernels.units import pool_magnitudes, pool_products
from spartan.weights.patterns import Pattern, check_fits, parse_pattern
from spartan.weights.prunable import Prunable
from tests.conftest import assert_rounded

WEIGHTS = {
    "linear": Prunable("linear", nn.Parameter(torch.zeros(8, 12))),
    "conv1d": Prunable("conv1d", nn.Parameter(torch.zeros(8, 4, 3))),
    "conv2d": Prunable("conv2d", nn.Parameter(torch.zeros(8, 4, 3, 2))),
    "conv3d": Prunable("conv3d", nn.Parameter(torch.zeros(4, 4, 2, 2, 2))),
    "transposed": Prunable("transposed", nn.Parameter(torch.zeros(12, 8)), input_first=True),
    "deconv": Prunable("deconv", nn.Parameter(torch.zeros(4, 8, 3)), input_first=True),
    "experts": Prunable("experts", nn.Parameter(torch.zeros(3, 8, 12)), stacked=True),
    "experts, inputs first": Prunable(
        "experts", nn.Parameter(torch.zeros(3, 12, 8)), input_first=True, stacked=True
    ),
}
PATTERNS = [
    Unstructured(), Block(2, 4), Block(4, 1), NM(1, 4), NM(2, 4), Channel(), Channel(inputs=True),
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_units_partition_the_weight(weight: Prunable, pattern: Pattern) -> None:
    shape = pattern.unit_shape(weight)
    ones = torch.ones(weight.shape)
    pooled = pool_magnitudes(-ones, pattern.grid(weight), shape)
    assert pooled.shape == shape
    assert bool((pooled == pattern.unit_numel(weight)).all())
    numbers = torch.arange(float(torch.Size(shape).numel())).view(shape)
    spread = pattern.spread(numbers, weight)
    assert spread.shape == weight.shape
    values, counts = spread.unique(return_counts=True)
    assert torch.equal(values, numbers.flatten())
    assert bool((counts == pattern.unit_numel(weight)).all())
    # Pooling is the adjoint of spreading: <pool(x z), y> = <x z, spread(y)>.
    x, z, y = torch.randn(weight.shape), torch.randn(weight.shape), torch.randn(shape)
    left = (pool_products(x, z, pattern.grid(weight), shape) * y).sum()
    right = (x * z * pattern.spread(y, weight)).double().sum()
    magnitude = (x * z * pattern.spread(y, weight)).abs().sum()
    assert_rounded(left, right, magnitude, x.numel())


def test_blocks_lie_at_one_kernel_position() -> None:
    weight = WEIGHTS["conv2d"]
    units = torch.zeros(Block(2, 4).unit_shape(weight))
    units[1, 0, 2, 1] = 1.0
    where = Block(2, 4).spread(units, weight).nonzero()
    assert where[:, 0].unique().tolist() == [2, 3]
    assert where[:, 1].unique().tolist() == [0, 1, 2, 3]
    assert where[:, 2:].unique(dim=0).tolist() == [[2, 1]]


def test_nm_rows_run_along_the_inputs() -> None:
    for name, inputs_dim in (("conv2d", 1), ("transposed", 0)):
        weight = WEIGHTS[name]
        units = torch.zeros(NM(1, 4).unit_shape(weight))
        units[0] = 1.0
        where = NM(1, 4).spread(units, weight).nonzero()
        assert where[:, inputs_dim].tolist() == [0, 1, 2, 3]
        others = [d for d in range(where.shape[1]) if d != inputs_dim]
        assert bool((where[:, others] == 0).all())


def test_channels_are_outputs() -> None:
    mask = torch.zeros(8)
    mask[3] = 1.0
    spread = Channel().spread(mask, WEIGHTS["deconv"])
    assert spread.nonzero()[:, 1].unique().tolist() == [3]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_names_round_trip(pattern: Pattern) -> None:
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize("text", ["", "blok:4x4", "block:4", "2:", "block:0x4", "5:4", "0:4"])
def test_bad_names_are_refused(text: str) -> None:
    with pytest.raises(PatternError):
        parse_pattern(text)


def test_sizes_that_do_not_divide_name_the_weight() -> None:
    with pytest.raises(PatternError, match="'linear' with 8 outputs and 12 inputs"):
        Block(3, 4).unit_shape(WEIGHTS["linear"])
    with pytest.raises(PatternError, match="groups of 8, but 'conv2d' has 4 inputs"):
        NM(2, 8).unit_shape(WEIGHTS["conv2d"])


@pytest.mark.parametrize("name", ["experts", "experts, inputs first"])
def test_units_lie_in_one_expert(name: str) -> None:
    """And there as in a matrix of its own."""
    stacked = WEIGHTS[name]
    alone = Prunable("one", nn.Parameter(stacked.parameter[0].detach()), stacked.input_first)
    for pattern in (Block(2, 4), NM(2, 4), Channel(), Channel(inputs=True)):
        shape = pattern.unit_shape(stacked)
        units = torch.arange(float(torch.Size(shape).numel())).view(shape)
        each = units.view(3, *pattern.unit_shape(alone))
        wanted = torch.stack([pattern.spread(one, alone) for one in each])
        assert torch.equal(pattern.spread(units, stacked), wanted)


def test_all_weights_that_do_not_fit_are_named() -> None:
    weights = [Prunable(f"layer{n}", nn.Parameter(torch.zeros(4, n))) for n in (4, 6, 7, 8)]
    with pytest.raises(PatternError, match="2 of 4 weights: 'layer6', 'layer7'"):
        check_fits(NM(2, 4), weights)
    with pytest.raises(PatternError, match="groups of 4, but 'layer6' has"):
        check_fits(NM(2, 4), weights[:2])


def test_the_inputs_of_an_unknown_layout_must_be_named() -> None:
    unknown = Prunable("w", nn.Parameter(torch.zeros(2, 4, 4)), stacked=True, layout_known=False)
    for pattern in (Block(2, 2), NM(2, 4), Channel()):
        with pytest.raises(PatternError, match=r"include=\['w:out,in'\]"):
            pattern.unit_shape(unknown)
    assert Unstructured().unit_shape(unknown) == (2, 4, 4)
