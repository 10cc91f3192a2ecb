r"""FCPTS as published (Gong et al., AAAI 2024), for comparison; see `fcpts` for what is repaired.

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
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spartan.counts import Limits, fit_counts
from spartan.errors import BudgetError, MethodError, PatternError
from spartan.kernels import Scores, masks_of
from spartan.methods.base import Method
from spartan.methods.groups import Contest, Group, keep_counts
from spartan.methods.sites import Site
from spartan.selection.hard import find_cut
from spartan.shares import erk_densities

_BINS = 100
_LOWEST = -30.0  # θ of a layer that keeps everything


@dataclass(frozen=True)
class PublishedFCPTS(Method):
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

    def select(self, groups: Sequence[Group], step: int, total_steps: int) -> None:
        for group in groups:
            if step == 0:
                _check(groups, group)
                _start(group)
            thresholds = [_threshold(group, site) for site in group.sites]
            if step < total_steps:
                for site, t in zip(group.sites, thresholds, strict=True):
                    site.mask = site.theta.abs() > t
            else:
                _project(group, thresholds)

    def pull_back(self, group: Group, sites: Sequence[Site], step: int, total_steps: int) -> None:
        wanted = 1.0 - group.share.kept / group.share.total
        thresholds = {site.name: _threshold(group, site) for site in sites}
        whole = sum(site.units for site in group.sites)
        pruned = sum(
            int((site.latent.abs() < _threshold(group, site)).sum()) for site in group.sites
        )
        side = math.copysign(1.0, pruned / whole - wanted) if pruned / whole != wanted else 0.0
        for site in sites:
            t, grad = thresholds[site.name], site.required_grad
            task = -0.5 * float((grad.double() * site.latent.double()).sum()) / site.loss_scale
            rate = self.penalty * side * site.units / whole * slope(site.latent, t)
            self._move(group, site, (task + rate) * t * (1.0 - t))
            grad.mul_(site.mask + 0.5 * site.latent.abs())

    def monitor(self, group: Group) -> dict[str, float]:
        kept = sum(site.kept for site in group.sites)
        return {"achieved": kept / group.share.total}

    def _move(self, group: Group, site: Site, gradient: float) -> None:
        """Take a step of SGD on θ."""
        numbers, speed = group.numbers, f"speed {site.name}"
        numbers[speed] = self.momentum * numbers.get(speed, 0.0) + gradient
        numbers[f"theta {site.name}"] -= self.lr * numbers[speed]


def slope(weights: Tensor, threshold: float) -> float:
    """Return p(t) + p(-t), from a histogram of the signed weights; 0 outside their range."""
    values = weights.flatten().float()
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


def _check(groups: Sequence[Group], group: Group) -> None:
    if not all(site.elementwise for site in group.sites):
        raise PatternError(
            "'fcpts-published' prunes weights one by one: its pattern is unstructured."
        )
    if len(groups) > 1 or not group.share.counted:
        raise BudgetError(
            "'fcpts-published' spreads one budget of parameters over all layers: use "
            "allocation='global' and cost='parameters'."
        )


def _start(group: Group) -> None:
    """Begin with the thresholds of an ERK allocation."""
    shapes = [tuple(site.weight.shape) for site in group.sites]
    densities = erk_densities(shapes, group.share.kept / group.share.total)
    for site, density in zip(group.sites, densities, strict=True):
        ordered = site.latent.flatten().abs().double().sort().values
        removed = min(len(ordered) - 1, int((1.0 - density) * len(ordered)))
        t = min(float(ordered[removed]), 1.0 - 1e-9)
        theta = math.log(t / (1.0 - t)) if t > 0 else _LOWEST
        group.numbers[f"theta {site.name}"] = max(theta, _LOWEST)


def _threshold(group: Group, site: Site) -> float:
    return 1.0 / (1.0 + math.exp(-group.numbers[f"theta {site.name}"]))


def _project(group: Group, thresholds: Sequence[float]) -> None:
    """Keep the largest |w| / t, as many as the budget allows, of each layer at least one."""
    sites = group.sites
    scales = [1.0 / t for t in thresholds]
    ones = [1.0] * len(sites)
    scores = Scores([s.theta for s in sites], scales, ones, absolute=True)
    cut = find_cut(scores, group.share.kept)
    densities = [float(mask.sum()) / mask.numel() for mask in masks_of(scores, cut)]
    units = [site.units for site in sites]
    limits = Limits([s.name for s in sites], units, ones, [1] * len(sites), units, group.share.kept)
    keep_counts(Contest(group, sites, group.share.kept, True), fit_counts(densities, limits))
