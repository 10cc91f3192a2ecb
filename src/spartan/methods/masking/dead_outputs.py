r"""Holds the gradients of outputs that keep nothing to the size of the others'.

An output (a row of a matrix, a filter) of which all weights are pruned is constant. A norm behind
it divides by its standard deviation, √ε, and so multiplies its gradient by up to 1/√ε ≈ 316. With
dense gradients its latent weights explode, take the budget of all others, and more outputs die,
until networks end at chance (`benchmarks/dead_outputs.py`). So, for each output r that keeps
nothing, before the gradient G of w is pulled back:

    G_r ← G_r · min(1, mean of ‖G_s‖ over the outputs s that keep something / ‖G_r‖)

The mean is over the outputs of the same weight, or of all weights where it has none left. Outputs
of ordinary size are not touched, and a dead output can still come back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spartan.kernels.scores import wide
from spartan.methods.masking.masked_weight import MaskedWeight


def hold_dead_outputs(weights: Sequence[MaskedWeight]) -> None:
    """Scale down, in place, the gradients of outputs that keep nothing."""
    # N:M keeps something in every row.
    free = [weight for weight in weights if weight.pattern.fixed_ratio is None]
    alive = [_alive(weight) for weight in free]
    if free and alive[0].is_cpu:  # a GPU is not waited for: there everything is computed
        whole = [bool(living.all()) for living in alive]
        if all(whole):
            return
        if all(bool(living.any()) for living in alive):
            free = [weight for weight, is_whole in zip(free, whole, strict=True) if not is_whole]
            alive = [living for living, is_whole in zip(alive, whole, strict=True) if not is_whole]
    norms = [_norms(weight) for weight in free]
    sums = [torch.where(a, norm, 0.0).sum() for norm, a in zip(norms, alive, strict=True)]
    counts = [living.sum() for living in alive]
    for i, weight in enumerate(free):
        # Where no output of a weight is left, those of the other weights say what is ordinary.
        overall = torch.stack(sums).sum() / torch.stack(counts).sum()
        most = torch.where(counts[i] > 0, sums[i] / counts[i], overall)  # NaN: none lives at all
        factors = torch.where(alive[i] | ~(norms[i] > most), 1.0, most / norms[i])
        weight.required_grad.mul_(factors.to(weight.required_grad.dtype))


def _alive(weight: MaskedWeight) -> Tensor:
    """Return which outputs keep something, in a shape that goes with the weight's."""
    mask = weight.spread(weight.mask)
    # As bytes: several times faster than the same of booleans.
    return mask.view(torch.uint8).amax(_within(weight), keepdim=True).bool()


def _norms(weight: MaskedWeight) -> Tensor:
    grad = wide(weight.required_grad)
    norms: Tensor = torch.linalg.vector_norm(grad, dim=_within(weight), keepdim=True)
    return norms


def _within(weight: MaskedWeight) -> list[int]:
    """Return the dimensions in which the weights of one output lie."""
    outputs = weight.prunable.output_dims
    return [dim for dim in range(weight.latent.dim()) if dim not in outputs]
