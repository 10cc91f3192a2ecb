"""Products of single connections equal dense ones, natively and by torch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spartan import kernels
from spartan.errors import KernelError
from spartan.kernels import connected
from spartan.kernels.connections import Connections
from tests.conftest import assert_rounded
from tests.kernels.test_products import SETS, each_set

SIZES = st.integers(1, 40)


def graph(outputs: int, inputs: int, density: float, seed: int) -> Connections:
    generator = torch.Generator().manual_seed(seed)
    keys = (torch.rand(outputs * inputs, generator=generator) < density).nonzero()[:, 0]
    return Connections.from_keys(keys, outputs, inputs)


def dense(connections: Connections, values: Tensor) -> Tensor:
    w = torch.zeros(connections.pairs, dtype=torch.float64)
    w[connections.keys()] = values.double()
    return w.view(connections.outputs, connections.inputs)


def check(c: Connections, panels: int, samples: int, bias: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(c.count, generator=generator)
    x = torch.randn(panels, c.inputs, samples, generator=generator)
    dy = torch.randn(panels, c.outputs, samples, generator=generator)
    b = torch.randn(c.outputs, generator=generator) if bias else None
    w = dense(c, values)
    wanted, sums = exact(w, b, x), exact(w.abs(), None if b is None else b.abs(), x.abs())
    assert_rounded(connected.multiply(c, values, b, x), wanted, sums, c.inputs + 1)
    dx, dvalues = connected.gradients(c, values, x, dy)
    assert_rounded(dx, exact(w.t(), None, dy), exact(w.t().abs(), None, dy.abs()), c.outputs)
    dw, sums = at_pairs(c, x, dy), at_pairs(c, x.abs(), dy.abs())
    assert_rounded(dvalues, dw, sums, panels * samples)
    assert_rounded(connected.at_pairs(c, x, dy), dw, sums, panels * samples)


def exact(w: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return w @ x.double() + (0 if bias is None else bias.double()[:, None])


def at_pairs(c: Connections, x: Tensor, dy: Tensor) -> Tensor:
    return (dy.double() @ x.double().transpose(1, 2)).sum(0).flatten()[c.keys()]


@each_set
@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.floats(0, 1), st.integers(1, 3), st.integers(0, 150), st.booleans())
def test_equal_dense_products(
    name: str, outputs: int, inputs: int, density: float, panels: int, samples: int, bias: bool
) -> None:
    with kernels.using(name):
        check(graph(outputs, inputs, density, 0), panels, samples, bias, 1)


@each_set
def test_equal_where_rows_are_swept_in_blocks(name: str) -> None:
    c = graph(30, 6000, 0.02, 0)
    with kernels.using(name):
        assert c.by_output.blocks(128) > 1
        check(c, 1, 128, True, 1)
    c = graph(6000, 30, 0.02, 0)
    with kernels.using(name):
        assert c.by_input.blocks(128) > 1
        check(c, 2, 100, False, 1)


@pytest.mark.skipif(len(SETS) == 1, reason="the native kernels are not built")
def test_any_number_of_threads_gives_the_same_bits(set_threads: Callable[[int], None]) -> None:
    c = graph(700, 500, 0.05, 0)
    values, x = torch.randn(c.count), torch.randn(3, 500, 70)
    dy = torch.randn(3, 700, 70)
    found = []
    for threads in (1, 2, 3):
        set_threads(threads)
        parts = connected.gradients(c, values, x, dy)
        found.append((connected.multiply(c, values, None, x), *parts, connected.at_pairs(c, x, dy)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.floats(0, 1))
def test_both_orders_hold_the_same_connections(outputs: int, inputs: int, density: float) -> None:
    indices = []
    for name in ("torch", SETS[-1]):
        with kernels.using(name):
            c = graph(outputs, inputs, density, 0)
            indices.append((c.by_input.starts, c.by_input.others, c.order))
    assert all(torch.equal(a, b) for a, b in zip(*indices, strict=True))
    starts, rows, order = indices[0]
    columns = torch.arange(inputs).repeat_interleave(starts.diff().long())
    assert torch.equal(rows.long() * inputs + columns, c.keys()[order.long()])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 700), st.booleans())
def test_panels_hold_what_was_split(
    images: int, features: int, samples: int, transposed: bool
) -> None:
    x = torch.randn(images, features, samples)
    if transposed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    parts = connected.split(x)
    assert all(part.shape[2] <= 256 for part in parts)
    assert torch.equal(connected.join(parts, images), x)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("starts", "columns", "message"),
    [
        (ints(0, 1, 2), ints(0, 5), "out of range"),
        (ints(0, 1, 2), ints(0, -1), "out of range"),
        (ints(0, 2, 2), ints(3, 1), "not rising"),
        (ints(0, 2, 2), ints(1, 1), "not rising"),
        (ints(0, 2, 1, 2), ints(0, 1), "falls"),
        (ints(0, 1, 3), ints(0, 1), "does not lead"),
        (ints(1, 1, 2), ints(0, 1), "does not lead"),
        (ints(), ints(0, 1), "does not lead"),
        (ints(0, 1, 2).long(), ints(0, 1), "int32"),
        (ints(0, 1, 2), ints(0, 9, 1, 9)[::2], "contiguous"),
    ],
)
def test_what_is_no_index_is_refused(starts: Tensor, columns: Tensor, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        Connections(starts, columns, 5)


@pytest.mark.skipif(len(SETS) == 1, reason="the native kernels are not built")
def test_lent_memory_is_one_tensors_at_a_time() -> None:
    c = graph(3000, 40, 0.05, 0)
    values = torch.randn(c.count)

    def result(seed: int) -> Tensor:
        x = torch.randn(1, 40, 128, generator=torch.Generator().manual_seed(seed))
        return connected.multiply(c, values, None, x)

    first, second = result(0), result(1)
    assert first.data_ptr() != second.data_ptr()
    kept, address = first.clone(), first.data_ptr()
    part = first[0, 10:20]
    del first
    assert result(2).data_ptr() not in (address, second.data_ptr())  # a view is alive
    assert torch.equal(part, kept[0, 10:20])
    del part
    addresses = {result(3).data_ptr() for _ in range(4)}
    again = result(4)
    assert again.data_ptr() in addresses | {address}  # what is free is lent again
    with torch.inference_mode():
        inferred = result(0)
    assert torch.equal(inferred, kept)
    assert torch.equal(copy.deepcopy(again), again)


@each_set
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), SIZES, st.integers(0, 300), st.booleans())
def test_rows_of_samples_are_gathered(
    name: str, images: int, features: int, samples: int, strided: bool
) -> None:
    x = torch.randn(images, samples, features + strided)[:, :, strided:].transpose(1, 2)
    with kernels.using(name):
        parts = connected.split(x)
        assert all(part.stride(2) == 1 or part.shape[2] <= 1 for part in parts)
        assert torch.equal(connected.join(parts, images), x)
