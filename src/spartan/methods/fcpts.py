r"""FCPTS (Gong et al., AAAI 2024): each layer learns its rate, under one global budget.

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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spartan.counts import Limits, fit_counts, least_units, logistic, logit, shift_to
from spartan.errors import MethodError
from spartan.methods.base import Method, mask_gradients, scale_gradients
from spartan.methods.groups import Contest, Group, contests_of, keep_counts, keep_largest
from spartan.methods.sites import Site
from spartan.schedules import check_fraction, progress
from spartan.shares import erk_densities

_FARTHEST = 8.0  # logits of rates: a layer that is all but dense can come down again
_SMALLEST = 1e-30  # threshold


@dataclass(frozen=True)
class FCPTS(Method):
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
    name: ClassVar[str] = "fcpts"
    summary: ClassVar[str] = "short runs from a trained network: layers learn their rates"
    paper: ClassVar[str] = "Gong et al., AAAI 2024"
    step_cost: ClassVar[str] = "a few passes over the weights"

    def __post_init__(self) -> None:
        for field in ("ramp", "finetune"):
            check_fraction(field, getattr(self, field))
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

    def select(self, groups: Sequence[Group], step: int, total_steps: int) -> None:
        contests = contests_of(groups, self.progress(step, total_steps))
        keep_largest([contest for contest in contests if contest.group.share.rows])
        for contest in contests:
            if not contest.group.share.rows:
                self._move_rates(contest.group)
                counts = fit_counts(_densities(contest), self._limits(contest))
                keep_counts(contest, counts)

    def pull_back(self, group: Group, sites: Sequence[Site], step: int, total_steps: int) -> None:
        if not self.moves_masks(step + 1, total_steps):
            mask_gradients(sites, [site.mask for site in sites])
            return
        thresholds = [_threshold(group, site) for site in sites]
        if not group.share.rows:
            self._look_at_shells(group, sites, thresholds)
        factors = []
        for site, threshold in zip(sites, thresholds, strict=True):
            returning = (site.scores() / (2 * threshold)).clamp_(max=0.5)
            factors.append(torch.where(site.mask, 1.0, returning))
        scale_gradients(sites, factors)

    def monitor(self, group: Group) -> dict[str, float]:
        thin = [logistic(x) for key, x in group.numbers.items() if key.startswith("rate ")]
        return {"thinnest": min(thin)} if thin else {}

    def _move_rates(self, group: Group) -> None:
        """Let the rates descend on the loss, and shift them back to the budget."""
        numbers, names = group.numbers, [site.name for site in group.sites]
        contest = Contest(group, group.sites, group.share.kept, at_target=True)
        limits = self._limits(contest)
        if f"rate {names[0]}" not in numbers:
            densities = _erk(group)
        else:
            gains = [numbers.get(f"gain {name}", 0.0) for name in names]
            powers = [numbers.get(f"power {name}", 0.0) for name in names]
            scale = math.sqrt(sum(powers) / len(powers)) or 1.0
            densities = [
                logistic(numbers[f"rate {name}"] + self.rate_step * gain / scale)
                for name, gain in zip(names, gains, strict=True)
            ]
        for name, density in zip(names, shift_to(densities, limits), strict=True):
            numbers[f"rate {name}"] = max(-_FARTHEST, min(_FARTHEST, logit(density)))

    def _look_at_shells(
        self, group: Group, sites: Sequence[Site], thresholds: Sequence[float | Tensor]
    ) -> None:
        """Take note of what units about the thresholds gain the loss: -b per unit of cost."""
        means = []
        for site, threshold in zip(sites, thresholds, strict=True):
            scores, mask = site.scores(), site.mask
            change = site.pool_product(site.required_grad)
            above = mask & (scores <= threshold * (1 + self.shell))
            below = ~mask & (scores >= threshold * (1 - self.shell))
            halves = [change[side].mean() for side in (above, below)]
            means.append(torch.stack(halves).nan_to_num_().mean())
        for site, b in zip(sites, torch.stack(means).tolist(), strict=True):
            gain = -b / (site.loss_scale * site.cost)
            for key, value in ((f"gain {site.name}", gain), (f"power {site.name}", gain**2)):
                before = group.numbers.get(key, value)
                group.numbers[key] = self.memory * before + (1 - self.memory) * value

    def _limits(self, contest: Contest) -> Limits:
        """Return what the sites of a contest may keep."""
        sites = contest.sites
        units = [site.units for site in sites]
        least = least_units(units, self.max_layer_sparsity)
        names, costs = [site.name for site in sites], [site.cost for site in sites]
        return Limits(names, units, costs, least, units, contest.budget)


def _densities(contest: Contest) -> list[float]:
    return [logistic(contest.group.numbers[f"rate {site.name}"]) for site in contest.sites]


def _erk(group: Group) -> list[float]:
    shapes = [tuple(site.weight.shape) for site in group.sites]
    totals = [site.units * site.cost for site in group.sites]
    return erk_densities(shapes, group.share.kept / sum(totals), totals)


def _threshold(group: Group, site: Site) -> float | Tensor:
    """Return the score at which a site is cut; one for each row of an N:M pattern."""
    if group.share.rows:
        kept = site.scores().masked_fill(~site.mask, torch.inf)
        return kept.amin(dim=1, keepdim=True).clamp_(min=_SMALLEST)
    return max(group.numbers.get(f"threshold {site.name}", 0.0), _SMALLEST)
