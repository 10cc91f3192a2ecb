"""Indices that are written into past torch's notice: refused in one sentence, never read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spartan.always_sparse import SparseLinear
from spartan.deploy.inference_layers import InferenceConv2d, InferenceLinear
from spartan.errors import KernelError
from spartan.kernels.dispatch import native_module

pytestmark = pytest.mark.skipif(native_module() is None, reason="torch looks at each index itself")


def by_data(tensor: Tensor, value: int) -> None:
    tensor.data[5:] = value


def by_numpy(tensor: Tensor, value: int) -> None:
    tensor.numpy()[5:] = value


def by_inference_mode(tensor: Tensor, value: int) -> None:
    with torch.inference_mode():
        tensor[5:] = value


WAYS = [by_data, by_numpy, by_inference_mode]


@pytest.mark.parametrize("write", WAYS)
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", ["columns", "row_starts"])
@pytest.mark.parametrize("value", [2**30, 3])
def test_of_always_sparse_layers(
    write: Callable[[Tensor, int], None], used: bool, name: str, value: int
) -> None:
    layer = SparseLinear(64, 48, density=0.2)
    x = torch.randn(5, 64)
    if used:
        layer(x).sum().backward()
    write(getattr(layer, name), value)
    with pytest.raises(KernelError, match="not the connections|written into"):
        layer(x).sum().backward()
    with pytest.raises(KernelError, match="not the connections|written into"):
        layer.to_dense()
    with pytest.raises(KernelError, match="not the connections|written into"):
        layer.state_dict()


def shifted(columns: Tensor) -> None:
    columns.data += 256


def flipped(columns: Tensor) -> None:
    columns.data += 1 << 28


def exchanged(columns: Tensor) -> None:
    columns.data[:1024] = columns.data[:1024].roll(512)


def doubled(columns: Tensor) -> None:
    columns.data.fill_(3)


@pytest.mark.parametrize("write", [shifted, flipped, exchanged, doubled])
@pytest.mark.parametrize("density", [0.125, 0.126])
def test_whole_patterns_are_noticed(write: Callable[[Tensor], None], density: float) -> None:
    """Also of numbers of connections in which the same change, made to all, could cancel."""
    layer = SparseLinear(256, 256, density=density)
    x = torch.randn(5, 256)
    layer(x)
    write(layer.columns)
    with pytest.raises(KernelError, match="written into"):
        layer(x)


def test_a_state_dict_repairs_them() -> None:
    layer = SparseLinear(64, 48, density=0.2)
    x = torch.randn(5, 64)
    expected, state = layer(x), {k: v.clone() for k, v in layer.state_dict().items()}
    by_data(layer.columns, 2**30)
    with pytest.raises(KernelError):
        layer(x)
    layer.load_state_dict(state)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("write", WAYS)
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", ["columns", "starts"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_of_accelerated_layers(
    write: Callable[[Tensor, int], None], used: bool, name: str, kind: str
) -> None:
    layer: nn.Module
    if kind == "linear":
        dense = nn.Linear(128, 128)
        dense.weight.data *= torch.rand(128, 128) < 0.1
        layer, few, many = InferenceLinear(dense), torch.randn(1, 128), torch.randn(64, 128)
    else:
        conv = nn.Conv2d(16, 32, 3, padding=1)
        conv.weight.data *= torch.rand_like(conv.weight) < 0.1
        layer = InferenceConv2d(conv)
        few, many = torch.randn(1, 16, 6, 6), torch.randn(2, 16, 9, 9)
    with torch.no_grad():
        if used:
            layer(few)
        write(getattr(layer, name), 2**30)
        with pytest.raises(KernelError, match="out of range|written into"):
            layer(many)
