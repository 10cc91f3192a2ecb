"""The weights of a memory: hard over parents, soft over children, the same on every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spartan import kernels
from spartan.kernels.mixing import mix

native = pytest.importorskip("spartan.kernels._native", reason="no native kernels here").Kernels
each_set = pytest.mark.parametrize("name", native.instruction_sets())

shapes = st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(0, 70))


def logits(shape: tuple[int, int, int], tied: bool, seed: int) -> tuple[Tensor, Tensor]:
    parents, children, positions = shape
    generator = torch.Generator().manual_seed(seed)
    of_parents = 3 * torch.randn(positions, parents, generator=generator)
    of_children = 3 * torch.randn(positions, parents * children, generator=generator)
    both = of_parents, of_children
    return (of_parents.round(), of_children.round()) if tied else both


@each_set
@settings(deadline=None, max_examples=60)
@given(shapes, st.booleans(), st.integers(0, 10**6), st.data())
def test_native_and_torch_agree(
    name: str, shape: tuple[int, int, int], tied: bool, seed: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.integers(1, shape[0]))
    results = []
    for backend in ("torch", name):
        own = [x.requires_grad_() for x in logits(shape, tied, seed)]
        with kernels.using(backend):
            weights = mix(*own, chosen, 1.6)
        factors = torch.arange(weights.numel()).sin().view_as(weights)
        grads = torch.autograd.grad(weights, own, factors)
        results.append((weights, *grads))
    for ours, expected in zip(results[1], results[0], strict=True):
        # Weights and factors are at most 1, logits about 15, which rounds in their difference.
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=3e-5)
    assert torch.equal(results[0][0] > 0, results[1][0] > 0)


@each_set
@settings(deadline=None, max_examples=60)
@given(shapes, st.booleans(), st.integers(0, 10**6), st.data())
def test_exactly_k_parents_the_first_of_equals(
    name: str, shape: tuple[int, int, int], tied: bool, seed: int, data: st.DataObject
) -> None:
    parents, _, positions = shape
    chosen = data.draw(st.integers(1, parents))
    own = logits(shape, tied, seed)
    with kernels.using(name):
        weights = mix(*own, chosen, 1.0).unflatten(1, (parents, -1))
    read = (weights > 0).all(-1)
    assert (read.sum(1) == chosen).all()
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(positions))
    for row, picked in zip(own[0].tolist(), read.tolist(), strict=True):
        best = sorted(range(parents), key=lambda n: (-row[n], n))[:chosen]
        assert sorted(best) == [n for n in range(parents) if picked[n]]


@each_set
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(name: str, bad: float) -> None:
    own = logits((5, 3, 4), False, 0)
    own[0][1, 0], own[1][2] = bad, bad
    with kernels.using(name):
        rows = mix(*own, 2, 1.0).isnan().any(1)
    assert rows.tolist() == [False, True, True, False]
