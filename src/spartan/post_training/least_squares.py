r"""Refits the kept weights of a layer by exact (ridge) least squares.

Row by row of the weight, with S the inputs that it keeps and r the ridge,

    w_S = argmin |w X - w₀ X₀|² + r |w - w₀|²  =  (H_SS + r I)⁻¹ (w₀ C + r w₀)_S.

With everything kept and X = X₀ this is w₀ itself. It is what layer-wise gradient descent on the
kept weights (AdaPrune, Hubara et al. 2021; POT, Lazarevich et al. 2021) converges to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spartan.post_training.grams import LayerProblem

_CHUNK = 1 << 24  # entries of the systems that are solved at a time: 128 MiB of float64


def refit(problem: LayerProblem, mask: Tensor) -> Tensor:
    """Return the weights that fit the layer's dense outputs best, zero outside the mask.

    Args:
        problem: The layer.
        mask: What is kept, boolean, (outputs, inputs).

    Returns:
        The weight as a matrix, double precision.
    """
    damped, pulled = problem.damped, problem.pulled
    size = len(mask) // problem.gram.groups
    counts = mask.sum(dim=1)
    result = torch.zeros_like(pulled)
    rows = counts.argsort(stable=True)
    rows = rows[counts[rows] > 0]
    while len(rows):
        # Rows with supports of similar size are solved together, the largest first.
        widest = int(counts[rows[-1]])
        part = rows[-max(1, _CHUNK // widest**2) :]
        rows = rows[: len(rows) - len(part)]
        support = mask[part].to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        support = support[:, :widest]
        valid = mask[part].gather(1, support)
        group = (part // size)[:, None, None]
        systems = damped[group, support[:, :, None], support[:, None, :]]
        systems = torch.where(valid[:, :, None] & valid[:, None, :], systems, 0.0)
        systems.diagonal(dim1=1, dim2=2).add_(~valid)
        right = torch.where(valid, pulled[part].gather(1, support), 0.0)
        solved = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(systems))
        result[part] = result[part].scatter(1, support, solved.squeeze(2) * valid)
    return result


def unconstrained(problem: LayerProblem) -> Tensor:
    """Return the weights that fit best with everything kept."""
    right = problem.grouped(problem.pulled)
    return torch.cholesky_solve(right.mT, problem.factor).mT.flatten(0, 1)
