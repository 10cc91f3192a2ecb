r"""FCPTS as published (Gong et al., AAAI 2024), a baseline; `fcpts` says what it repairs.

    t_l = σ(θ_l),  m = 1[|w| > t_l],  ŵ = m ⊙ w            thresholds and masks
    S_l(t) = #{i : |w_i| < t} / n_l,   dS_l/dt = p_l(t) + p_l(-t)      the bridge
    L = L_task + λ |Σ_l n_l S_l / N - S*|                   the penalty for missing the global rate

The densities p_l are those of a histogram with 100 bins. The straight-through gradient of the
masks, dm/dz = ½ · 1[|z| < 1] with z = |w| - t, gives with G = dL_task/dŵ

    dL/dw = G ⊙ m + ½ G ⊙ |w|,      dL_task/dt = -½ Σ_i G_i w_i

over all weights of a layer. (The released code cuts these two off, so that only the penalty moves
its thresholds.) θ moves by SGD with momentum at the learning rate of the weights. The rate is not
held: it is where penalty and task balance, until the last step, which ranks all |w| / t_l and keeps
what the budget allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from spartan.budgets.allocation import erk_densities
from spartan.budgets.layer_bounds import LayerBounds, fit_counts
from spartan.errors import BudgetError, MethodError, PatternError
from spartan.kernels import Scores, masks_of
from spartan.methods.masking.contract import MaskingMethod
from spartan.methods.masking.groups import BudgetGroup, Competition, keep_counts
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.methods.masking.state import Forecast, WeightState
from spartan.selection.hard import find_cutoff

_BINS = 100  # of the histogram, as in the released code
# θ of a layer that keeps everything: σ(-30) is below every weight that is not 0. Huge gradients
# move θ no further, and to -_LOWEST at most.
_LOWEST = -30.0


@dataclass
class LearnedThreshold(WeightState):
    """The threshold of one layer.

    Attributes:
        theta: θ_l, t_l = σ(θ_l).
        speed: What momentum has gathered of its gradients.
        threshold: The cutoff of the last projection.
    """

    theta: float = 0.0
    speed: float = 0.0
    threshold: Forecast = field(default_factory=Forecast)


@dataclass(frozen=True)
class PublishedFCPTS(MaskingMethod):
    """Sigmoid thresholds under a penalty; exact only in the end. A baseline.

    Attributes:
        penalty: λ.
        lr: Learning rate of the thresholds.
        momentum: Of their SGD.

    Raises:
        MethodError: A setting is out of range.
        PatternError: The pattern is not unstructured.
        BudgetError: The budget is not one of parameters, allocated globally.

    Source: Gong et al., "Fast and Controllable Post-training Sparsity", AAAI 2024.
    """

    penalty: float = 1.0
    lr: float = 0.01
    momentum: float = 0.9

    checks_weights: ClassVar[bool] = True
    weight_state: ClassVar[type[WeightState]] = LearnedThreshold
    learns_rates: ClassVar[bool] = True
    rates_only: ClassVar[bool] = True
    name: ClassVar[str] = "fcpts-published"
    summary: ClassVar[str] = "FCPTS with sigmoid thresholds and a penalty, as a baseline"
    paper: ClassVar[str] = "Gong et al., AAAI 2024"
    step_cost: ClassVar[str] = "a few passes over the weights, and histograms of them"

    def __post_init__(self) -> None:
        if not (self.penalty >= 0 and self.lr > 0 and 0 <= self.momentum < 1):
            raise MethodError(
                f"penalty={self.penalty} must be 0 or more, lr={self.lr} positive and "
                f"momentum={self.momentum} in [0, 1)."
            )

    def moves_masks(self, step: int, total_steps: int) -> bool:
        return True

    def progress(self, step: int, total_steps: int) -> float:
        return float(step >= total_steps)

    def select(self, groups: Sequence[BudgetGroup], step: int, total_steps: int) -> None:
        for group in groups:
            if step == 0:
                _check(groups, group)
                _start(group)
            thresholds = [_threshold(weight) for weight in group.weights]
            if step < total_steps:
                for weight, t in zip(group.weights, thresholds, strict=True):
                    weight.mask = weight.theta.abs() > t
            else:
                _project(group, thresholds)

    def pull_back(
        self, group: BudgetGroup, weights: Sequence[MaskedWeight], step: int, total_steps: int
    ) -> None:
        wanted = 1.0 - group.budget.kept / group.budget.total
        thresholds = {weight.name: _threshold(weight) for weight in weights}
        whole = sum(weight.units for weight in group.weights)
        pruned = sum(
            int((weight.latent.abs() < _threshold(weight)).sum()) for weight in group.weights
        )
        side = math.copysign(1.0, pruned / whole - wanted) if pruned / whole != wanted else 0.0
        for weight in weights:
            t, grad = thresholds[weight.name], weight.required_grad
            task = -0.5 * float((grad.double() * weight.latent.double()).sum()) / weight.loss_scale
            rate = self.penalty * side * weight.units / whole * slope(weight.latent, t)
            self._move(weight, (task + rate) * t * (1.0 - t))
            grad.mul_(weight.mask + 0.5 * weight.latent.abs())

    def monitor(self, group: BudgetGroup) -> dict[str, float]:
        kept = sum(weight.kept for weight in group.weights)
        return {"achieved": kept / group.budget.total}

    def _move(self, weight: MaskedWeight, gradient: float) -> None:
        """Take a step of SGD on θ."""
        state = weight.state_as(LearnedThreshold)
        state.speed = self.momentum * state.speed + gradient
        state.theta = min(max(state.theta - self.lr * state.speed, _LOWEST), -_LOWEST)


def slope(theta: Tensor, threshold: float) -> float:
    """Return p(t) + p(-t), from a histogram of the signed weights; 0 outside their range."""
    values = theta.flatten().float()
    low, high = float(values.min()), float(values.max())
    if low == high:
        return 0.0
    counts = torch.histc(values, _BINS, low, high)
    width = (high - low) / _BINS
    total = 0.0
    for place in (threshold, -threshold):
        if low <= place <= high:
            bin_ = min(_BINS - 1, int((place - low) / width))
            total += float(counts[bin_]) / (len(values) * width)
    return total


def _check(groups: Sequence[BudgetGroup], group: BudgetGroup) -> None:
    if not all(weight.elementwise for weight in group.weights):
        raise PatternError(
            "'fcpts-published' prunes weights one by one: its pattern is unstructured."
        )
    if len(groups) > 1 or not group.budget.counted:
        raise BudgetError(
            "'fcpts-published' spreads one budget of parameters over all layers: use "
            "allocation='global' and cost='parameters'."
        )


def _start(group: BudgetGroup) -> None:
    """Begin with the thresholds of an ERK allocation."""
    shapes = [tuple(weight.prunable.shape) for weight in group.weights]
    densities = erk_densities(shapes, group.budget.kept / group.budget.total)
    for weight, density in zip(group.weights, densities, strict=True):
        ordered = weight.latent.flatten().abs().double().sort().values
        removed = min(len(ordered) - 1, int((1.0 - density) * len(ordered)))
        t = min(float(ordered[removed]), 1.0 - 1e-9)
        theta = math.log(t / (1.0 - t)) if t > 0 else _LOWEST
        weight.state_as(LearnedThreshold).theta = max(theta, _LOWEST)


def _threshold(weight: MaskedWeight) -> float:
    return 1.0 / (1.0 + math.exp(-weight.state_as(LearnedThreshold).theta))


def _project(group: BudgetGroup, thresholds: Sequence[float]) -> None:
    """Keep the largest |w| / t, as many as the budget allows, of each layer at least one."""
    weights = group.weights
    scales = [1.0 / t for t in thresholds]
    ones = [1.0] * len(weights)
    scores = Scores([s.theta for s in weights], scales, ones, absolute=True)
    cutoff = find_cutoff(scores, group.budget.kept)
    densities = [float(mask.sum()) / mask.numel() for mask in masks_of(scores, cutoff)]
    units = [weight.units for weight in weights]
    names = [weight.name for weight in weights]
    bounds = LayerBounds(names, units, ones, [1] * len(units), units, group.budget.kept)
    states = [weight.state_as(LearnedThreshold) for weight in weights]
    competition = Competition(group, weights, group.budget.kept, at_target=True)
    keep_counts(competition, fit_counts(densities, bounds), [s.threshold for s in states])
