"""Kernel of the SPARTAN memory: top-k over parents, softmax over each one's children.

From logits of parents l and of their children s, for each position,

    S    = the k largest l_n, of equal ones the first
    a_n  = exp(l_n) / sum over S of exp(l), or 0 outside S
    b_nc = exp(s_nc / T) / sum over c of exp(s_nc / T)
    w_nc = a_n b_nc

and with G = dL/dw and r_n = Σ_c w_nc G_nc

    dL/dl_n  = r_n - a_n Σ_m r_m
    dL/ds_nc = w_nc (G_nc - r_n / a_n) / T

in which a_n = Σ_c w_nc, so that the weights are all that is kept for the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spartan.kernels.dispatch import native_for_any_order
from spartan.kernels.scores import wide


def mix(of_parents: Tensor, of_children: Tensor, chosen: int, temperature: float) -> Tensor:
    """Return the weights w of all values.

    Args:
        of_parents: Logits l, (positions, N), floating point.
        of_children: Logits s, (positions, N * C), those of the first parent's children first.
        chosen: Number k of parents that each position reads, 1 to N.
        temperature: T.

    Returns:
        (positions, N * C), in the dtype of the logits, at least float32. Weights may underflow to
        0; with logits that are not finite, which of a position's are NaN is up to the backend.
    """
    of_parents, of_children = wide(of_parents), wide(of_children)
    native = _native(of_parents, of_children)
    if native is None:
        return _mix(of_parents, of_children, chosen, temperature)
    arguments = of_parents, of_children, chosen, temperature, native
    if not torch.is_grad_enabled():
        return _mix_natively(*arguments)
    weights: Tensor = _Mix.apply(*arguments)  # type: ignore[no-untyped-call]
    return weights


def choose(logits: Tensor, chosen: int) -> Tensor:
    """Return the places of the largest logits (..., parents), the first ones of equals."""
    order = logits.detach().sort(dim=-1, descending=True, stable=True).indices
    return order[..., :chosen]


def soft_over_chosen(logits: Tensor, chosen: int) -> Tensor:
    """Return a: the softmax over the largest logits (..., parents), exactly 0 elsewhere."""
    if chosen == logits.shape[-1]:
        return logits.softmax(-1)
    places = choose(logits, chosen)
    rest = torch.full_like(logits, -torch.inf)
    return rest.scatter(-1, places, logits.gather(-1, places)).softmax(-1)


def _native(of_parents: Tensor, of_children: Tensor) -> Any:
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if traced or torch._C._are_functorch_transforms_active():
        return None  # these look inside, and know torch's operators
    return native_for_any_order(of_parents, of_children)


def _mix(of_parents: Tensor, of_children: Tensor, chosen: int, temperature: float) -> Tensor:
    a = soft_over_chosen(of_parents, chosen)
    b = (of_children / temperature).unflatten(1, (of_parents.shape[1], -1)).softmax(-1)
    weights: Tensor = (a.unsqueeze(-1) * b).flatten(1)
    return weights


def _mix_natively(
    of_parents: Tensor, of_children: Tensor, chosen: int, temperature: float, native: Any
) -> Tensor:
    of_parents, of_children = of_parents.contiguous(), of_children.contiguous()
    weights = torch.empty_like(of_children)
    native.mix(
        of_parents=of_parents,
        of_children=of_children,
        weights=weights,
        chosen=chosen,
        temperature=temperature,
        threads=torch.get_num_threads(),
    )
    return weights


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        of_parents: Tensor,
        of_children: Tensor,
        chosen: int,
        temperature: float,
        native: Any,
    ) -> Tensor:
        weights = _mix_natively(of_parents, of_children, chosen, temperature, native)
        ctx.parents, ctx.temperature = of_parents.shape[1], temperature
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        w = weights.unflatten(1, (ctx.parents, -1))
        products = w * grads[0].unflatten(1, (ctx.parents, -1))
        r, a = products.sum(-1), w.sum(-1)
        of_parents = r - a * r.sum(-1, keepdim=True)
        mean = torch.where(a > 0, r / a, 0.0)
        of_children = torch.addcmul(products, w, mean.unsqueeze(-1), value=-1.0)
        return of_parents, of_children.flatten(1) / ctx.temperature, None, None, None
