r"""Powerpropagation (Schwarz et al., NeurIPS 2021), with magnitude pruning.

    w = sign(θ) |θ|^α · h,    dL/dθ = G · h · α |θ|^(α - 1),    h = top k of |w|

For α > 1 large weights learn faster and small ones stall, so that training by itself gathers
weights at zero, where pruning them hurts less. θ begins at sign(w) |w|^(1/α), so that w is that of
the model.
α = 1 is magnitude pruning.

Optimizers that divide by the scale of the gradient (Adam) cancel the factor α |θ|^(α - 1), and with
it the method: use SGD. Weight decay acts on θ. A weight that is 0 stays 0 where α > 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spartan.errors import MethodError
from spartan.kernels.scores import wide
from spartan.kernels.units import pool_magnitudes
from spartan.methods.masking.contract import mask_gradients
from spartan.methods.masking.groups import BudgetGroup, competitions_of, require_finite
from spartan.methods.masking.magnitude import Magnitude
from spartan.methods.masking.masked_weight import MaskedWeight


@dataclass(frozen=True)
class Powerpropagation(Magnitude):
    """Train powers of the weights; prune the smallest weights as `Magnitude` does.

    Attributes:
        alpha: α, at least 1.
        schedule: See `Magnitude`, as for the fields below.
        begin: Fraction of the run before which nothing is pruned.
        end: Fraction of the run at which the gradual schedule reaches the budget.
        finetune: Last fraction of the run, with fixed masks.

    Raises:
        MethodError: A setting is out of range.

    Source: Schwarz, Jayakumar, Pascanu, Latham, Teh, "Powerpropagation: A sparsity inducing weight
    reparameterisation", NeurIPS 2021.
    """

    alpha: float = 2.0

    name: ClassVar[str] = "powerpropagation"
    summary: ClassVar[str] = "magnitude pruning for SGD that draws weights to zero as it trains"
    paper: ClassVar[str] = "Schwarz et al., NeurIPS 2021"
    step_cost: ClassVar[str] = "two powers of each weight and a top-k, in torch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.alpha) and self.alpha >= 1):
            raise MethodError(f"alpha={self.alpha} must be at least 1; 1 is magnitude pruning.")

    def to_latent(self, weight: MaskedWeight, w: Tensor) -> Tensor:
        return _power(w, 1 / self.alpha).to(w.dtype)

    def materialize(self, weight: MaskedWeight) -> Tensor:
        w = _power(weight.theta, self.alpha).to(weight.latent.dtype)
        return torch.where(weight.spread(weight.mask), w, 0.0)

    def select(self, groups: Sequence[BudgetGroup], step: int, total_steps: int) -> None:
        for competition in competitions_of(groups, self.progress(step, total_steps)):
            require_finite(competition.weights)
            magnitudes = [self._magnitudes(weight) for weight in competition.weights]
            masks = competition.largest(competition.budget, magnitudes)
            for weight, mask in zip(competition.weights, masks, strict=True):
                weight.mask = mask

    def _magnitudes(self, weight: MaskedWeight) -> Tensor:
        """Return the sum of |w|, as if all were kept, over each unit."""
        w = _power(weight.theta, self.alpha)
        if weight.elementwise:
            return w.abs_()
        return pool_magnitudes(w, weight.grid, weight.stored_mask.shape)

    def pull_back(
        self, group: BudgetGroup, weights: Sequence[MaskedWeight], step: int, total_steps: int
    ) -> None:
        mask_gradients(weights, [weight.mask for weight in weights])
        for weight in weights:
            weight.required_grad.mul_(
                wide(weight.latent).abs().pow_(self.alpha - 1).mul_(self.alpha)
            )


def _power(x: Tensor, exponent: float) -> Tensor:
    """Return sign(x) |x|^exponent, in float32 or float64; its form has no 0 · ∞ at x = 0."""
    x = wide(x)
    return x.abs().pow_(exponent).copysign_(x)
