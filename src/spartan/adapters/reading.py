"""Three implementations of the SPARTAN memory read, equal in outputs and gradients.

Every position h picks k of N parents and mixes the C children of each one it picked:

    l_n  = P_n · h
    S    = the k largest l_n, of equal ones the first
    a_n  = exp(l_n) / sum over S of exp(l), or 0 outside S
    b_nc = exp(K_nc · h / T) / sum over c of exp(K_nc · h / T)
    o    = sum over n in S of a_n sum over c of b_nc V_nc
    h'   = h + o

Source: Deshpande et al., "SPARTAN: Sparse Hierarchical Memory for Parameter-Efficient
Transformers", 2022, figure 1 and the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from spartan.kernels.mixing import choose, mix, soft_over_chosen
from spartan.kernels.scores import wide

# What gathering costs for each parent (sorting) and each child that is read (moving its key and its
# value), in rows of a product of matrices: measured on a CPU (benchmarks/memory.py --part forms),
# without and with gradients. Without them, products of many positions are cheaper still.
_COSTS = {False: (10.0, 150.0), True: (4.5, 100.0)}
_MANY = 256  # positions

Form = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


def masked(h: Tensor, p: Tensor, k: Tensor, v: Tensor, chosen: int, temperature: float) -> Tensor:
    """Read with all children of all parents, those of parents not chosen weighted by 0.

    Args:
        h: (positions, H).
        p: Parents P, (N, H).
        k: Keys of the children K, (N, C, H).
        v: Their values V, (N, C, H).
        chosen: Parents that each position picks.
        temperature: T.

    Returns:
        h + o, (positions, H).
    """
    a = soft_over_chosen(wide(F.linear(h, p)), chosen)
    b = (wide(torch.einsum("th,nch->tnc", h, k)) / temperature).softmax(-1)
    return h + torch.einsum("tn,tnc,nch->th", a.to(v.dtype), b.to(v.dtype), v)


def gathered(h: Tensor, p: Tensor, k: Tensor, v: Tensor, chosen: int, temperature: float) -> Tensor:
    """Read with the children of the chosen parents only; arguments as of `masked`."""
    logits = wide(F.linear(h, p))
    places = choose(logits, chosen)
    a = logits.gather(1, places).softmax(-1)
    b = (wide(torch.einsum("th,tjch->tjc", h, k[places])) / temperature).softmax(-1)
    weights = a.unsqueeze(-1) * b
    return h + torch.einsum("tjc,tjch->th", weights.to(v.dtype), v[places])


def fused(h: Tensor, p: Tensor, k: Tensor, v: Tensor, chosen: int, temperature: float) -> Tensor:
    """Read with products of matrices, and one kernel between; arguments as of `masked`."""
    values = v.flatten(0, 1)
    weights = mix(F.linear(h, p), F.linear(h, k.flatten(0, 1)), chosen, temperature)
    if h.dtype is values.dtype is weights.dtype and not torch.is_autocast_enabled(h.device.type):
        return torch.addmm(h, weights, values)
    return h + weights.to(values.dtype) @ values


def fastest(parents: int, children: int, chosen: int, positions: int, grad: bool) -> Form:
    """Return the form that is fastest for a memory of this shape, with gradients or without."""
    sort, gather = _COSTS[grad]
    if positions > _MANY and not grad:
        gather *= 2
    gathering = sort * parents + gather * chosen * children
    return gathered if gathering < 2 * parents * children else fused
