r"""Finds out from its gradients whether a norm follows a weight.

Scaling a weight W in front of a norm changes nothing, L(aW) = L(W), so its gradient G has
⟨W, G⟩ = 0: over all of it before a layer norm, and output by output before a batch norm. Directions
that have nothing to do with each other agree by chance as much as

    cos²(W, G) = 1 / n        of n weights; of the n weights of one output

so the smaller of the two, n ⟨W, G⟩² / (‖W‖² ‖G‖²) over all of W or over its outputs, tells one case
from the other: below 0.00001 right behind a norm, above 0.1 in networks without, also where the
gradients were computed in half precision. No type of module is looked at. A bias between weight and
norm is not scaled along, which a batch norm does not notice and others do: such weights mostly
count as without a norm.
"""

from __future__ import annotations

import math

from torch import Tensor

from spartan.kernels.scores import wide
from spartan.methods.masking.masked_weight import MaskedWeight

# The mean over so many gradients decides: a single one may be orthogonal by chance.
GRADIENTS = 8
# Between what was seen of both cases, ten times below the smaller of those without a norm.
MOST = 0.01


def agreement(weight: MaskedWeight) -> float | None:
    """Return how far weight and gradient agree, relative to chance; None where either is zero."""
    w, grad = wide(weight.parameter), wide(weight.required_grad)
    outputs = weight.prunable.output_dims
    within = [dim for dim in range(w.dim()) if dim not in outputs]
    products = (w * grad).sum(within)
    squares = w.square().sum(within), grad.square().sum(within)
    by_output = _ratio(products.square().sum(), (squares[0] * squares[1]).sum())
    whole = _ratio(products.sum().square(), squares[0].sum() * squares[1].sum())
    if by_output is None or whole is None:
        return None
    return min(by_output * w.numel() / products.numel(), whole * w.numel())


def _ratio(part: Tensor, of: Tensor) -> float | None:
    over, under = float(part), float(of)
    return over / under if math.isfinite(over) and 0 < under < math.inf else None
