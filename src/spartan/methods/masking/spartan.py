r"""Spartan: soft top-k masking by regularised optimal transport (Tai et al., NeurIPS 2022).

With u = mean |θ| of each unit, budget k_t and sharpness β_t, one step of training is

    m   = soft_topk(u, k_t, β_t)              m_i = sigmoid(β_t u_i + μ),  Σ c_i m_i = k_t
    h   = hard_topk(u, k_t)                   exactly k_t
    w   = θ · m · h                           forward; unit values repeat over their weights
    G   = dL/dw
    q_B = Σ_{j ∈ B} G_j θ_j                   gradient of the mask entry of unit B
    dL/dθ = m · G + sign(θ) · β s (q / c - price),   s = m (1 - m),   price = Σ q s / Σ c s

so the hard cut is passed straight through and the soft mask is differentiated: pruned weights
keep learning. k_t falls from everything to the budget over the first `warmup` of the run; β_t
grows until the last `finetune` of it, after which m · h stays fixed.

The published β multiplies raw |θ|, so its effect depends on the scale of the weights. The default
`beta_scale="relative"` takes away that scale: scores are multiplied such that the hard threshold at
the target density, the smallest weight that will stay, lies at 0.2. That is about where it lies in
a small residual network with batch norms (0.11 to 0.25 in ResNet-20s on CIFAR-10), so that there
relative and absolute β nearly agree.

While β is small the kept weights are scaled by small m. Layers with a norm behind them do not
notice; through all others the signal would shrink. So two more things differ from the paper:

* weights whose gradients do not say that a norm follows (`norm_follows`) are hard: w = θ · h, and
  dL/dθ = min(1, m / m(τ)) · G (`soft_mask`);
* gradients of outputs that keep nothing are held to the size of the others' (`dead_outputs`).

`Spartan.published()` is the rule without all three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from spartan import kernels
from spartan.budgets.group_budget import RowBudget
from spartan.errors import MethodError
from spartan.kernels import ScanRequest, units
from spartan.kernels.readback import read_back
from spartan.methods.masking import soft_mask
from spartan.methods.masking.annealed import AnnealedMasking
from spartan.methods.masking.contract import mask_gradients, scale_gradients
from spartan.methods.masking.dead_outputs import hold_dead_outputs
from spartan.methods.masking.groups import (
    BudgetGroup,
    Competition,
    by_rows,
    competitions_of,
    find_cutoffs,
    keep_largest,
    scan_scores,
)
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.methods.masking.soft_mask import SoftMask
from spartan.methods.masking.state import Forecast, GroupState, WeightState
from spartan.methods.masking.writing import write_masked
from spartan.schedules import Curve, interpolate, progress
from spartan.selection import soft
from spartan.selection.soft import DualSearch

# Where relative β puts the hard threshold at the target density: about where it lies in a small
# residual network with batch norms, so that there relative and absolute β nearly agree.
_THRESHOLD = 0.2
# Below, a threshold counts as zero: β, which grows as it falls, must stay within float32.
_TINY = 1e-30


@dataclass
class Sharpness(GroupState):
    """β of a group, and guesses that save passes over its weights.

    Attributes:
        scale: What scores are divided by, so that the target's threshold lies at 0.2.
        beta: β as last used, per unit of score.
        soft: Score at which the soft mask is one half.
        target: Threshold at the target density, while the density is on its way there.
    """

    scale: float | None = None
    beta: float | None = None
    soft: Forecast = field(default_factory=Forecast)
    target: Forecast = field(default_factory=Forecast)


@dataclass(frozen=True)
class Spartan(AnnealedMasking):
    """Soft top-k masks with straight-through hard projection.

    Attributes:
        beta: Sharpness at the first step and from `1 - finetune` of the run on.
        beta_scale: `"relative"`: β acts on scores scaled such that the hard threshold at the
            target density is 0.2. `"absolute"`: as published, β acts on raw mean |θ|, and its end
            value is multiplied by sqrt(weights per unit).
        warmup: Fraction of the run over which the density falls from 1 to the target. 0: the
            target density from the first forward pass on.
        finetune: Last fraction of the run, with fixed masks.
        annealing: Shape of both schedules.

    Raises:
        MethodError: A setting is out of range.

    Source: Tai, Tian, Lim, "Spartan: Differentiable Sparsity via Regularized Transportation",
    NeurIPS 2022, arXiv 2205.14107.
    """

    # From tasks of the league, two seeds each: on convolutions without norms at 10 % β to 4 gave
    # 53.4 %, to 20 52.6 %; on the ResNet at 2 % this descent gave 59.2 %, a line over a fifth of
    # the run 57.4 %, at 10 % they are level. Ends from 2 to 8 differ by less than the seeds.
    beta: tuple[float, float] = (1.0, 4.0)
    beta_scale: Literal["relative", "absolute"] = "relative"
    warmup: float = 0.4
    finetune: float = 0.2
    annealing: Curve = "cubic"

    checks_weights: ClassVar[bool] = True
    weight_state: ClassVar[type[WeightState]] = SoftMask
    group_state: ClassVar[type[GroupState]] = Sharpness
    name: ClassVar[str] = "spartan"
    summary: ClassVar[str] = (
        "the default: soft or hard masks by layer, dense gradients; strongest at low density"
    )
    paper: ClassVar[str] = "Tai et al., NeurIPS 2022"
    step_cost: ClassVar[str] = "four to six passes over the weights, native on the CPU"

    def __post_init__(self) -> None:
        if len(self.beta) != 2 or not all(math.isfinite(b) and b > 0 for b in self.beta):
            raise MethodError(f"beta={self.beta!r} must be two positive numbers: start and end.")
        if self.beta_scale not in ("relative", "absolute"):
            raise MethodError(f"beta_scale={self.beta_scale!r}; known: relative, absolute.")
        self.check_schedule()

    @classmethod
    def published(
        cls, beta: tuple[float, float] = (1.0, 20.0), warmup: float = 0.2, finetune: float = 0.2
    ) -> Spartan:
        """Return the published rule: β on raw |θ|, every weight multiplied by its soft mask, lines.

        As published, layers may lose everything: add `Budget(layer_floor=0)` for that.
        """
        return cls(beta, "absolute", warmup, finetune, "linear")

    def select(self, groups: Sequence[BudgetGroup], step: int, total_steps: int) -> None:
        if step == 0 and self.beta_scale == "absolute":  # as published, all are multiplied by m
            for group in groups:
                for weight in group.weights:
                    weight.state_as(SoftMask).hard = False
        rows, others = by_rows(competitions_of(groups, self.progress(step, total_steps)))
        self._select_rows(rows, step, total_steps)
        self._select_units(others, step, total_steps)
        if step >= self._last_update(total_steps):
            for group in groups:
                for weight in group.weights:
                    soft_mask.fix(weight)

    def _select_units(
        self, competitions: Sequence[Competition], step: int, total_steps: int
    ) -> None:
        """Find hard and soft masks of groups, in steady state with one look at the weights."""
        find_cutoffs([c for c in competitions if c.group.state.threshold.value is None])
        self._find_scales([c for c in competitions if _sharpness(c.group).scale is None])
        searches = [self._search(competition, step, total_steps) for competition in competitions]
        requests = [
            competition.request(competition.group.state.threshold.bracket, search)
            for competition, search in zip(competitions, searches, strict=True)
        ]
        # The scale of the next step. Before the target is reached, its threshold is another one.
        early = [c for c in competitions if self.beta_scale == "relative" and not c.at_target]
        results = scan_scores([*competitions, *early], [*requests, *map(_at_target, early)])
        soft_mask.decide([weight for c in competitions for weight in c.weights])
        for search, result in zip(searches, results, strict=False):
            if result.mass is not None:
                search.take(result.mass)
        soft.solve_all(searches)

        for competition, search, result in zip(competitions, searches, results, strict=False):
            competition.keep(result.cutoff, search.dual)
            soft_mask.store(competition, result.cutoff, search.dual)
            state = _sharpness(competition.group)
            state.threshold.remember(result.cutoff.threshold)
            state.soft.remember(search.dual.threshold)
            state.beta = search.dual.beta
            if competition.at_target:
                state.scale = _scale(competition, result.cutoff.threshold)
        for competition, result in zip(early, results[len(competitions) :], strict=True):
            state = _sharpness(competition.group)
            state.target.remember(result.cutoff.threshold)
            state.scale = _scale(competition, result.cutoff.threshold)

    def _find_scales(self, competitions: Sequence[Competition]) -> None:
        if self.beta_scale == "relative":
            results = scan_scores(competitions, [_at_target(c) for c in competitions])
            for competition, result in zip(competitions, results, strict=True):
                scale = _scale(competition, result.cutoff.threshold)
                _sharpness(competition.group).scale = scale

    def _search(self, competition: Competition, step: int, total_steps: int) -> DualSearch:
        """Start the search for the soft mask where its threshold is expected."""
        state = _sharpness(competition.group)
        beta = self._beta(competition, step, total_steps)
        reference, expected = state.threshold.value or 0.0, state.soft.expected
        start = 0.0 if expected is None else beta * (reference - expected)
        return DualSearch(competition.scores, competition.budget, beta, reference, start)

    def _select_rows(
        self, competitions: Sequence[Competition], step: int, total_steps: int
    ) -> None:
        """Find the masks of N:M patterns, where each row is a group of its own."""
        keep_largest(competitions)
        soft_mask.decide([weight for c in competitions for weight in c.weights])
        tops = [[_row_thresholds(weight) for weight in c.weights] for c in competitions]
        if self.beta_scale == "relative" and competitions:
            means = read_back([torch.cat(top).double().mean().reshape(1) for top in tops])
            for competition, (mean,) in zip(competitions, means, strict=True):
                _sharpness(competition.group).scale = _scale(competition, mean)
        for competition, thresholds in zip(competitions, tops, strict=True):
            beta = self._beta(competition, step, total_steps)
            _sharpness(competition.group).beta = beta
            for weight, threshold in zip(competition.weights, thresholds, strict=True):
                kept = round(competition.budget)
                soft_mask.store_rows(weight, soft.soft_rows(weight.scores(), kept, beta, threshold))

    def write(self, weights: Sequence[MaskedWeight]) -> None:
        soft_mask.write(weights)

    def materialize(self, weight: MaskedWeight) -> Tensor:
        # Of a newborn weight all is kept, without a soft mask.
        if weight.newborn or not self.is_soft(weight):
            return super().materialize(weight)
        if soft_mask.stored(weight) is None:
            weight.apply_pending()
            # In the memory order of the parameter, so that the same kernel writes the same bits.
            like = weight.parameter
            w = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
            write_masked([weight], [w])
            return w
        kept = torch.where(weight.mask, soft_mask.of(weight), 0.0)
        # Adding zero turns the -0.0 of pruned negative weights into +0.0.
        return (weight.theta * weight.spread(kept)).add_(0.0).to(weight.latent.dtype)

    def pull_back(
        self, group: BudgetGroup, weights: Sequence[MaskedWeight], step: int, total_steps: int
    ) -> None:
        moving = step < self._last_update(total_steps)
        if moving and self.beta_scale == "relative":  # "absolute" is the published rule
            soft_mask.look_for_norms(weights)
            hold_dead_outputs(weights)
        hard = [weight for weight in weights if not self.is_soft(weight)]
        scaled = [weight for weight in weights if self.is_soft(weight)]
        if not moving:
            mask_gradients(hard, [weight.mask for weight in hard])
            scale_gradients(scaled, [soft_mask.of(weight) for weight in scaled])
            return
        # Of newborn weights all is kept: w = θ.
        soft_mask.damp_gradients([weight for weight in hard if not weight.newborn])
        scaled = [weight for weight in scaled if not weight.newborn]
        if not scaled:
            return
        if all(weight.dual is not None for weight in scaled):
            kernels.pull_back(
                [weight.required_grad for weight in scaled],
                [weight.latent for weight in scaled],
                [weight.scale for weight in scaled],
                [weight.cost for weight in scaled],
                [weight.dual for weight in scaled if weight.dual is not None],
            )
        else:
            _pull_back_units(group, scaled)

    def is_soft(self, weight: MaskedWeight) -> bool:
        return not weight.state_as(SoftMask).hard

    def lacks(self, weight: MaskedWeight, step: int, total_steps: int) -> str | None:
        fixed = step >= self._last_update(total_steps)
        kept = fixed and not self.is_soft(weight)
        known = soft_mask.stored(weight) is not None or kept or (weight.dual and not fixed)
        return None if known or weight.newborn else "soft mask"

    def monitor(self, group: BudgetGroup) -> dict[str, float]:
        state = _sharpness(group)
        numbers = {"beta": state.beta, "scale": state.scale}
        return {name: number for name, number in numbers.items() if number is not None}

    def _beta(self, competition: Competition, step: int, total_steps: int) -> float:
        start, end = self.beta
        fraction = progress(step, self._last_update(total_steps), self.annealing)
        if self.beta_scale == "absolute":
            return interpolate(start, end * math.sqrt(competition.mean_unit_numel), fraction)
        scale = _sharpness(competition.group).scale
        assert scale is not None
        return interpolate(start, end, fraction) / scale


def _sharpness(group: BudgetGroup) -> Sharpness:
    return group.state_as(Sharpness)


def _at_target(competition: Competition) -> ScanRequest:
    """Ask for the threshold at the target density."""
    group = competition.group
    expected = _sharpness(group).target.bracket
    return ScanRequest(competition.scores, group.budget.kept, expected, threshold_only=True)


def _scale(competition: Competition, threshold: float) -> float:
    """Return what scores are divided by; the mean score stands in for a threshold of zero."""
    if not _TINY < threshold < math.inf:
        sums = [weight.scores().sum(dtype=torch.float64) for weight in competition.weights]
        threshold = float(torch.stack(sums).sum()) / sum(
            s.stored_mask.numel() for s in competition.weights
        )
    return (threshold if threshold > _TINY else 1.0) / _THRESHOLD


def _row_thresholds(weight: MaskedWeight) -> Tensor:
    """Return the smallest kept score of each row."""
    return torch.where(weight.mask, weight.scores(), math.inf).amin(1, keepdim=True)


def _pull_back_units(group: BudgetGroup, weights: Sequence[MaskedWeight]) -> None:
    """Pull back where a unit has many weights, or a budget of its own for each row."""
    soft_masks = [soft_mask.of(weight) for weight in weights]
    spreads = [m * (1.0 - m) for m in soft_masks]
    upstream = [weight.pool_product(weight.required_grad) for weight in weights]
    beta = _sharpness(group).beta
    assert beta is not None
    if isinstance(group.budget, RowBudget):
        terms = [soft.pull_back_rows(s, q, beta) for s, q in zip(spreads, upstream, strict=True)]
    else:
        terms = soft.pull_back(spreads, upstream, [weight.cost for weight in weights], beta)
    for weight, m, term in zip(weights, soft_masks, terms, strict=True):
        term.mul_(weight.cost / weight.divisor)
        units.pull_back_units(weight.required_grad, weight.latent, m, term, weight.grid)
