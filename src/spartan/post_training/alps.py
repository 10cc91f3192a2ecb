r"""ALPS: a layer's mask and weights together, by ADMM with a penalty that grows until they agree.

min |W₀ X₀ - W X|² + r |W₀ - W|²  with at most k units of W not zero, as two copies of W, of which
one fits (B) and one is sparse (Z), with the multipliers V and the penalty ρ of their difference:

    B  ←  (P - V + ρ Z) (H + ρ I)⁻¹          P = W₀ C + r W₀, with r in H
    Z  ←  the k units of B + V / ρ that are largest
    V  ←  V + ρ (B - Z)

Inputs are scaled before, so that H has ones on its diagonal, and H is decomposed once: each round
is two products of matrices. ρ begins small, and grows the more slowly the fewer units still come
and go; when none does, what stays is refitted by least squares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spartan.errors import MethodError
from spartan.post_training.grams import LayerProblem
from spartan.post_training.least_squares import refit
from spartan.post_training.solver import LayerSolver, Solution

# As published: ρ at first, rounds between two looks at the units, and by how much ρ grows where at
# least so large a share of the kept units has changed since the last look.
_PENALTY = 0.1
_LOOK = 3
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


@dataclass(frozen=True)
class ALPS(LayerSolver):
    """Alternating directions: fit, keep the largest, let the penalty of their difference grow.

    Attributes:
        rounds: At most so many.

    Raises:
        MethodError: `rounds` is below 1.

    Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large
    Language Models", NeurIPS 2024, sections 3.1 and 3.2. Their conjugate gradients at the end are
    exact least squares here.
    """

    rounds: int = 300

    name: ClassVar[str] = "alps"
    summary: ClassVar[str] = (
        "mask and weights together by ADMM; layers of up to some thousand inputs"
    )
    paper: ClassVar[str] = "Meng et al., NeurIPS 2024"
    step_cost: ClassVar[str] = "inputs³ + rounds x outputs x inputs² for each layer"

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise MethodError(f"rounds={self.rounds} must be at least 1.")

    def prune(self, problem: LayerProblem, kept: int) -> Solution:
        units = self.units(problem, kept)
        return Solution(units, refit(problem, problem.tiling.spread(units)))

    def units(self, problem: LayerProblem, kept: int) -> Tensor:
        """Return what stays; the rounds are in single precision."""
        tiling = problem.tiling
        damped = problem.damped
        scale = damped.diagonal(dim1=1, dim2=2).rsqrt()[:, None]  # (groups, 1, inputs)
        values, vectors = torch.linalg.eigh(scale.mT * damped * scale)
        values, vectors = values.clamp(min=0).float(), vectors.float()
        p = (problem.grouped(problem.pulled) * scale).float()
        z = (problem.grouped(problem.dense) / scale).float()
        v = torch.zeros_like(z)
        penalty, before = _PENALTY, None
        for round_number in range(self.rounds):
            right = (p - v + penalty * z) @ vectors
            b = (right / (values[:, None] + penalty)) @ vectors.mT
            moved = b + v / penalty
            units = tiling.largest(tiling.pool(moved.square().flatten(0, 1)), kept)
            z = moved * problem.grouped(tiling.spread(units))
            v += penalty * (b - z)
            if round_number % _LOOK:
                continue
            if before is not None:
                changed = int((units != before).sum())
                if not changed:
                    break
                share = changed / max(1, int(units.sum()))
                penalty *= next(factor for least, factor in _GROWTH if share >= least)
            before = units
        return units
