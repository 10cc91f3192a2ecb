"""The forms of the memory agree with each other and with the paper's formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spartan.adapters import Memory, MemoryConfig
from spartan.adapters.reading import fastest, fused, gathered, masked

FORMS = {"masked": masked, "gathered": gathered, "fused": fused}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())

T = 1.6


def tensors(
    n: int, c: int, width: int, positions: int, seed: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (positions, width), (n, width), (n, c, width), (n, c, width)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 20), st.integers(1, 30),
       st.integers(0, 10**6), st.data())  # fmt: skip
def test_forms_agree(
    n: int, c: int, width: int, positions: int, seed: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.integers(1, n))
    results = []
    for form in FORMS.values():
        # In float64: gradients are sums that may cancel, whose rounding there is out of sight.
        own = [x.requires_grad_() for x in tensors(n, c, width, positions, seed, torch.float64)]
        out = form(*own, chosen, T)
        results.append((out, *torch.autograd.grad(out.sin().sum(), own)))
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@each_form
def test_one_position_by_hand(form: object) -> None:
    h, p, k, v = tensors(4, 3, 6, 1, 0, torch.float64)
    full = torch.softmax(p @ h[0], 0)
    best = sorted(range(4), key=lambda n: -float(full[n]))[:2]
    expected = h[0].clone()
    for n in best:
        # The full softmax, renormalized over the chosen parents.
        a = full[n] / sum(full[m] for m in best)
        b = torch.softmax(k[n] @ h[0] / T, 0)
        expected += a * sum(b[i] * v[n, i] for i in range(3))
    torch.testing.assert_close(form(h, p, k, v, 2, T)[0], expected, rtol=1e-12, atol=1e-12)  # type: ignore[operator]


@each_form
def test_gradients_are_right(form: object) -> None:
    own = [x.requires_grad_() for x in tensors(5, 2, 4, 3, 1, torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: form(*x, 3, T), own)  # type: ignore[operator]


@each_form
def test_gradients_reach_the_chosen_parents_only(form: object) -> None:
    own = [x.requires_grad_() for x in tensors(8, 3, 6, 1, 2)]
    form(*own, 3, T).sin().sum().backward()  # type: ignore[operator]
    h, p, k, v = own
    chosen = set((p @ h[0]).topk(3).indices.tolist())
    for tensor in (p, k, v):
        moved = {n for n in range(8) if tensor.grad[n].abs().max() > 0}
        assert moved == chosen


@each_form
def test_all_parents_is_the_soft_memory_and_one_is_its_mixture(form: object) -> None:
    h, p, k, v = tensors(5, 3, 6, 7, 3)
    b = torch.softmax(torch.einsum("th,nch->tnc", h, k) / T, -1)
    mixtures = torch.einsum("tnc,nch->tnh", b, v)
    soft = h + torch.einsum("tn,tnh->th", torch.softmax(h @ p.T, -1), mixtures)
    torch.testing.assert_close(form(h, p, k, v, 5, T), soft, rtol=1e-4, atol=1e-5)  # type: ignore[operator]
    one = h + mixtures[torch.arange(7), (h @ p.T).argmax(-1)]
    torch.testing.assert_close(form(h, p, k, v, 1, T), one, rtol=1e-4, atol=1e-5)  # type: ignore[operator]


@each_form
@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_the_change_is_bounded_by_the_values(form: object, seed: int) -> None:
    h, p, k, v = tensors(6, 3, 8, 5, seed)
    change = form(h, p, k, v, 2, T) - h  # type: ignore[operator]
    assert (change.norm(dim=-1) <= v.norm(dim=-1).max() * (1 + 1e-4) + 1e-5).all()


def test_positions_are_alone() -> None:
    torch.manual_seed(0)
    memory = Memory(MemoryConfig(init="normal"), 24)
    h = torch.randn(3, 10, 24)
    order = torch.randperm(10)
    out = memory(h, (), nn.Identity())
    torch.testing.assert_close(memory(h[:, order], (), nn.Identity()), out[:, order])
    torch.testing.assert_close(memory(h[:1, :4], (), nn.Identity()), out[:1, :4])


def test_the_form_follows_the_shape() -> None:
    assert fastest(16, 3, 8, 128, True) is fused
    assert fastest(1024, 16, 1, 128, True) is gathered
    assert fastest(1024, 16, 1, 128, False) is gathered
    assert fastest(256, 16, 2, 1024, False) is fused
