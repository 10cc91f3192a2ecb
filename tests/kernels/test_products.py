"""Sparse products equal dense ones, for every instruction set and the torch version."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from spartan import kernels
from spartan.errors import KernelError
from spartan.kernels.blocked_weights import Geometry
from spartan.kernels.products import Product
from spartan.kernels.row_bundles import HEIGHTS, RowBundles, best_height, bundle
from tests.conftest import assert_rounded, examples

SETS = ["torch"]
if importlib.util.find_spec("spartan.kernels._native"):
    SETS += importlib.import_module("spartan.kernels._native").Kernels.instruction_sets()

each_set = pytest.mark.parametrize("name", SETS)
ACTIVATE = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu}


def sparse(*shape: int, density: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < density
    return torch.randn(shape, generator=generator) * kept


def absolute_linear(
    x: Tensor, w: Tensor, bias: Tensor | None = None, more: Tensor | None = None
) -> Tensor:
    """Return the sums of absolute products of a layer, which bound its rounding.

    An activation adds little: the slope of ReLU is at most 1, that of GELU 1.13.
    """
    sums = F.linear(
        x.abs().double(), w.abs().double(), None if bias is None else bias.abs().double()
    )
    return 1.2 * (sums if more is None else sums + more.abs())


def widest(w: Tensor) -> int:
    """Return the most terms that an output adds up: its weights, a bias and an addend."""
    return int((w != 0).flatten(1).sum(1).max()) + 2


@each_set
@settings(max_examples=examples(120))
@given(st.integers(1, 150), st.integers(1, 90), st.integers(1, 140), st.sampled_from(HEIGHTS),
       st.floats(0, 0.5), st.sampled_from(sorted(ACTIVATE)), st.booleans(), st.booleans(),
       st.booleans(), st.integers(0, 2**16))  # fmt: skip
def test_linear(
    name: str, samples: int, inputs: int, outputs: int, height: int, density: float,
    activation: str, addend: bool, feature_major: bool, turned: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    w = sparse(outputs, inputs, density=density, seed=seed)
    bias = torch.randn(outputs)
    x = torch.randn(inputs, samples).t() if turned else torch.randn(samples, inputs)
    more = torch.randn(samples, outputs) if addend else None
    with kernels.using(name):
        y = Product(bundle(w, height), bias).linear(x, more, activation, feature_major)
    wanted = F.linear(x.double(), w.double(), bias.double()) + (0 if more is None else more)
    sums = absolute_linear(x, w, bias, more)
    assert_rounded(y, ACTIVATE[activation](wanted), sums, widest(w))


@each_set
@settings(max_examples=examples(120))
@given(st.integers(1, 19), st.integers(1, 9), st.integers(1, 20), st.integers(1, 21),
       st.integers(1, 37), st.sampled_from([(1, 1), (3, 3), (1, 5), (7, 7), (2, 3)]),
       st.tuples(st.integers(1, 3), st.integers(1, 3)),
       st.tuples(st.integers(0, 3), st.integers(0, 3)),
       st.tuples(st.integers(1, 2), st.integers(1, 2)), st.sampled_from(HEIGHTS),
       st.integers(1, 3), st.sampled_from(["nchw", "chnw", "nhwc"]), st.booleans(),
       st.integers(0, 2**16))  # fmt: skip
def test_convolution(
    name: str, images: int, channels: int, outputs: int, rows: int, columns: int,
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int], height: int, threads: int, order: str, addend: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    g = Geometry(channels, rows, images, columns, kernel, stride, padding, dilation, threads)
    assume(g.out_rows >= 1 and g.out_columns >= 1)
    w = sparse(outputs, channels, *kernel, density=0.3, seed=seed)
    bias = torch.randn(outputs)
    x = torch.randn(images, channels, rows, columns)
    if order == "chnw":
        x = x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    if order == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    wanted = F.conv2d(x.double(), w.double(), bias.double(), stride, padding, dilation)
    more = torch.randn(wanted.shape) if addend else None
    before, now = torch.get_num_threads(), threads
    torch.set_num_threads(now)
    try:
        with kernels.using(name):
            product = Product(bundle(w.flatten(1), height), bias)
            y = product.convolution(x, g, more, "relu")
    finally:
        torch.set_num_threads(before)
    settings_of = stride, padding, dilation
    sums = F.conv2d(x.abs().double(), w.abs().double(), bias.abs().double(), *settings_of)
    sums, wanted = (sums, wanted) if more is None else (sums + more.abs(), wanted + more)
    assert_rounded(y, F.relu(wanted), sums, widest(w))


@pytest.mark.parametrize("shape", [(3, 224, 7, 2, 3), (2, 3000, 3, 1, 1), (600, 6, 3, 1, 1)])
def test_wide_images_and_many_channels(shape: tuple[int, ...]) -> None:
    channels, size, k, stride, padding = shape
    w = sparse(8, channels, k, k, density=0.2, seed=0)
    x = torch.randn(1, channels, 9, size)
    g = Geometry(channels, 9, 1, size, (k, k), (stride,) * 2, (padding,) * 2, (1, 1))
    y = Product(bundle(w.flatten(1)), None).convolution(x, g, None)
    sums = F.conv2d(x.abs().double(), w.abs().double(), None, stride, padding)
    assert_rounded(y, F.conv2d(x.double(), w.double(), None, stride, padding), sums, widest(w))


def test_wide_matrices_take_more_than_one_block() -> None:
    for inputs in (9000, 70_000):  # the latter is beyond 16-bit columns
        w = sparse(20, inputs, density=0.05, seed=1)
        for samples in (1, 40):
            x = torch.randn(samples, inputs)
            y = Product(bundle(w), None).linear(x, None)
            assert_rounded(y, x.double() @ w.double().t(), absolute_linear(x, w), widest(w))


@pytest.mark.parametrize(
    ("shape", "height"), [((16, 1), 16), ((4, 1), 4), ((8, 3), 8), ((1, 1), 1)]
)
def test_the_height_of_blocks_is_found(shape: tuple[int, int], height: int) -> None:
    rows, columns = shape
    kept = torch.rand(64 // rows, 96 // columns) < 0.2
    w = torch.randn(64, 96) * kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    assert best_height(w) == height
    assert torch.equal(bundle(w).dense(), w)


def test_nan_and_infinity_go_where_dense_would_send_them() -> None:
    w = torch.eye(40)
    x = torch.zeros(20, 40)
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    y = Product(bundle(w, 1), None).linear(x, None, "relu")
    assert y[3, 5].isnan()
    assert y[4, 6].isinf()
    assert y.isfinite().sum() == y.numel() - 2


def test_threads_share_a_product() -> None:
    w = sparse(200, 300, density=0.1, seed=0)
    product = Product(bundle(w), None)
    inputs = [torch.randn(1 + 7 * i, 300) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for x, y in zip(inputs, pool.map(lambda x: product.linear(x, None), inputs), strict=True):
            assert_rounded(y, x.double() @ w.double().t(), absolute_linear(x, w), widest(w))


def test_weights_that_point_outside_are_refused() -> None:
    sound = bundle(sparse(8, 8, density=0.5, seed=0), 1)
    columns, starts = sound.columns.clone(), sound.starts.clone()
    columns[0] = 8
    starts[2] = 1000
    broken: list[RowBundles] = [
        replace(sound, columns=columns),
        replace(sound, columns=-sound.columns - 1),
        replace(sound, starts=starts),
        replace(sound, starts=sound.starts[:-1]),
        replace(sound, values=sound.values[:-1]),
    ]
    for weights in broken:
        with pytest.raises(KernelError, match="out of range"):
            Product(weights, None)
