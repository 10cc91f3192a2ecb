r"""FCPTS (Gong et al., AAAI 2024): learned layer sparsities under one global budget.

A layer l with n_l units keeps those whose score (mean |θ|) exceeds its threshold t_l. A bridge
makes its density d_l a function of the threshold, whose slope is the density of units there,

    d_l = #{u : score_u > t_l} / n_l,      dd_l/dt_l = -p_l(t_l),

and the task's loss reaches the threshold through the units that it separates. With G the gradient
of the loss with respect to w, and the *shell* the units with |score - t_l| <= h t_l,

    dL/dt_l = -n_l p_l(t_l) · b_l,  so  dL/dd_l = n_l · b_l,      b_l = mean over the shell of G · θ

p_l cancels: no density has to be estimated. The units just above the threshold are at w = θ and
those just below at w = 0; the mean of the two means is the trapezoidal rule for the change of the
loss between them, right to second order. At the best rates -b_l per unit of cost is the same in
every layer that is free to move.

Rates are logits, free of the scale of the weights. They descend on L in mirror fashion, and one
multiplier λ holds the budget, at every step, exactly:

    logit d_l  ←  logit d_l - η b_l / (c_l rms(b/c)) + λ,      Σ_l c_l n_l d_l = budget

where b is averaged over the last steps, and its root mean square, over steps and layers, is of what
single batches say: noise moves the rates little. With m the masks, the gradient that θ gets is, as
published but with windows relative to thresholds,

    dL/dθ = G ⊙ m + G · |θ| / (2 t) · 1[score < t]

so that pruned weights can come back. The published form, whose thresholds are sigmoids and whose
budget is a penalty, is `fcpts_published`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from spartan.budgets.allocation import erk_densities
from spartan.budgets.group_budget import RowBudget
from spartan.budgets.layer_bounds import (
    LayerBounds,
    fit_counts,
    least_units,
    logistic,
    logit,
    shift_to,
)
from spartan.errors import MethodError
from spartan.methods.masking.contract import MaskingMethod, mask_gradients, scale_gradients
from spartan.methods.masking.groups import (
    BudgetGroup,
    Competition,
    by_rows,
    competitions_of,
    keep_counts,
    keep_largest,
)
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.methods.masking.state import Forecast, WeightState
from spartan.schedules import check_fraction, progress

_FARTHEST = 8.0  # logits of rates: a layer that is all but dense can come down again
_SMALLEST = 1e-30  # threshold, which is divided by: 0 where a layer keeps everything


@dataclass
class LearnedRate(WeightState):
    """The rate of one layer, and what its thresholds were worth.

    Attributes:
        rate: logit d.
        gain: -b / c, averaged over the last steps.
        power: Its square, likewise.
        threshold: t, the cutoff score of the last selection.
    """

    rate: float | None = None
    gain: float | None = None
    power: float | None = None
    threshold: Forecast = field(default_factory=Forecast)


@dataclass(frozen=True)
class FCPTS(MaskingMethod):
    """Learned rates for layers under a global budget; pruned weights can come back.

    Attributes:
        ramp: Fraction of the run over which the density falls to the budget.
        finetune: Last fraction of the run, with fixed masks and rates.
        rate_step: η, how far a rate moves in a step, in logits.
        shell: h, half the width of the shell, relative to the threshold.
        memory: Share of a layer's last b that enters the next.
        max_layer_sparsity: No layer loses more than this; every layer keeps a unit.

    Raises:
        MethodError: A setting is out of range.

    Source: Gong et al., "Fast and Controllable Post-training Sparsity: Learning Optimal Sparsity
    Allocation with Global Constraint in Minutes", AAAI 2024.
    """

    ramp: float = 0.5
    finetune: float = 0.2
    rate_step: float = 0.03
    shell: float = 0.2
    memory: float = 0.9
    max_layer_sparsity: float = 1.0

    checks_weights: ClassVar[bool] = True
    weight_state: ClassVar[type[WeightState]] = LearnedRate
    learns_rates: ClassVar[bool] = True
    name: ClassVar[str] = "fcpts"
    summary: ClassVar[str] = "short runs from a trained network: layers learn their rates"
    paper: ClassVar[str] = "Gong et al., AAAI 2024"
    step_cost: ClassVar[str] = "a few passes over the weights"

    def __post_init__(self) -> None:
        for name in ("ramp", "finetune"):
            check_fraction(name, getattr(self, name))
        if self.ramp + self.finetune > 1.0:
            raise MethodError(
                f"ramp={self.ramp}, finetune={self.finetune}: together at most the whole run, 1."
            )
        if not (self.rate_step >= 0 and 0 < self.shell < 1 and 0 <= self.memory < 1):
            raise MethodError(
                f"rate_step={self.rate_step} must be 0 or more, shell={self.shell} in (0, 1) and "
                f"memory={self.memory} in [0, 1)."
            )
        check_fraction("max_layer_sparsity", self.max_layer_sparsity)

    def moves_masks(self, step: int, total_steps: int) -> bool:
        return step <= total_steps - int(self.finetune * total_steps)

    def progress(self, step: int, total_steps: int) -> float:
        return progress(step, int(self.ramp * total_steps), "cubic")

    def with_max_layer_sparsity(self, most: float) -> Self:
        return dataclasses.replace(self, max_layer_sparsity=min(self.max_layer_sparsity, most))

    def select(self, groups: Sequence[BudgetGroup], step: int, total_steps: int) -> None:
        rows, others = by_rows(competitions_of(groups, self.progress(step, total_steps)))
        keep_largest(rows)
        for competition in others:
            self._move_rates(competition.group)
            rates = [_rate(weight) for weight in competition.weights]
            counts = fit_counts([logistic(r.rate or 0.0) for r in rates], self._bounds(competition))
            keep_counts(competition, counts, [r.threshold for r in rates])

    def pull_back(
        self, group: BudgetGroup, weights: Sequence[MaskedWeight], step: int, total_steps: int
    ) -> None:
        if not self.moves_masks(step + 1, total_steps):
            mask_gradients(weights, [weight.mask for weight in weights])
            return
        thresholds = [_threshold(group, weight) for weight in weights]
        if not isinstance(group.budget, RowBudget):
            self._look_at_shells(weights, thresholds)
        factors = []
        for weight, threshold in zip(weights, thresholds, strict=True):
            returning = (weight.scores() / (2 * threshold)).clamp_(max=0.5)
            factors.append(torch.where(weight.mask, 1.0, returning))
        scale_gradients(weights, factors)

    def lacks(self, weight: MaskedWeight, step: int, total_steps: int) -> str | None:
        rows = weight.pattern.fixed_ratio is not None  # whose rates are given
        return None if rows or _rate(weight).rate is not None else "rate"

    def monitor(self, group: BudgetGroup) -> dict[str, float]:
        rates = [_rate(weight).rate for weight in group.weights]
        thin = [logistic(rate) for rate in rates if rate is not None]
        return {"thinnest": min(thin)} if thin else {}

    def _move_rates(self, group: BudgetGroup) -> None:
        """Let the rates descend on the loss, and shift them back to the budget."""
        rates = [_rate(weight) for weight in group.weights]
        competition = Competition(group, group.weights, group.budget.kept, at_target=True)
        if rates[0].rate is None:
            densities = _erk(group)
        else:
            scale = math.sqrt(sum(r.power or 0.0 for r in rates) / len(rates)) or 1.0
            densities = [
                logistic((r.rate or 0.0) + self.rate_step * (r.gain or 0.0) / scale) for r in rates
            ]
        shifted = shift_to(densities, self._bounds(competition))
        for r, density in zip(rates, shifted, strict=True):
            r.rate = max(-_FARTHEST, min(_FARTHEST, logit(density)))

    def _look_at_shells(
        self, weights: Sequence[MaskedWeight], thresholds: Sequence[float | Tensor]
    ) -> None:
        """Take note of what units about the thresholds gain the loss: -b per unit of cost."""
        means = []
        for weight, threshold in zip(weights, thresholds, strict=True):
            scores, mask = weight.scores(), weight.mask
            change = weight.pool_product(weight.required_grad)
            above = mask & (scores <= threshold * (1 + self.shell))
            below = ~mask & (scores >= threshold * (1 - self.shell))
            halves = [change[side].mean() for side in (above, below)]
            means.append(torch.stack(halves).nan_to_num_().mean())
        for weight, b in zip(weights, torch.stack(means).tolist(), strict=True):
            gain = -b / (weight.loss_scale * weight.cost)
            rate = _rate(weight)
            rate.gain = self._remembered(rate.gain, gain)
            rate.power = self._remembered(rate.power, gain**2)

    def _remembered(self, before: float | None, value: float) -> float:
        before = value if before is None else before
        return self.memory * before + (1 - self.memory) * value

    def _bounds(self, competition: Competition) -> LayerBounds:
        """Return what the weights of a competition may keep."""
        weights = competition.weights
        units = [weight.units for weight in weights]
        least = least_units(units, self.max_layer_sparsity)
        names, costs = [weight.name for weight in weights], [weight.cost for weight in weights]
        return LayerBounds(names, units, costs, least, units, competition.budget)


def _rate(weight: MaskedWeight) -> LearnedRate:
    return weight.state_as(LearnedRate)


def _erk(group: BudgetGroup) -> list[float]:
    shapes = [tuple(weight.prunable.shape) for weight in group.weights]
    totals = [weight.units * weight.cost for weight in group.weights]
    return erk_densities(shapes, group.budget.kept / sum(totals), totals)


def _threshold(group: BudgetGroup, weight: MaskedWeight) -> float | Tensor:
    """Return the cutoff score of a weight; one for each row of an N:M pattern."""
    if isinstance(group.budget, RowBudget):
        kept = weight.scores().masked_fill(~weight.mask, torch.inf)
        return kept.amin(dim=1, keepdim=True).clamp_(min=_SMALLEST)
    return max(_rate(weight).threshold.value or 0.0, _SMALLEST)
