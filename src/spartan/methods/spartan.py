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

While β is small the kept weights are scaled by small m. Layers followed by a norm do not notice;
in networks without norms the signal shrinks with m, and they want a larger β or learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from spartan.errors import MethodError
from spartan.methods.base import Group, Method, Site
from spartan.schedules import check_annealing, check_fraction, check_order, interpolate, progress
from spartan.selection import soft
from spartan.selection.hard import Selection
from spartan.selection.packing import Packing

# Where relative β puts the hard threshold at the target density.
_THRESHOLD = 0.2


@dataclass(frozen=True)
class Spartan(Method):
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

    beta: tuple[float, float] = (1.0, 20.0)
    beta_scale: Literal["relative", "absolute"] = "relative"
    warmup: float = 0.2
    finetune: float = 0.2
    annealing: Literal["linear", "cosine"] = "linear"

    name: ClassVar[str] = "spartan"
    summary: ClassVar[str] = "soft masks, dense gradients; robust up to high sparsities"
    paper: ClassVar[str] = "Tai et al., NeurIPS 2022"

    def __post_init__(self) -> None:
        if len(self.beta) != 2 or not all(math.isfinite(b) and b > 0 for b in self.beta):
            raise MethodError(f"beta={self.beta!r} must be two positive numbers: start and end.")
        if self.beta_scale not in ("relative", "absolute"):
            raise MethodError(f"beta_scale={self.beta_scale!r}; known: relative, absolute.")
        check_fraction("warmup", self.warmup)
        check_fraction("finetune", self.finetune)
        check_order(self.warmup, self.finetune)
        check_annealing(self.annealing)

    def moves_masks(self, step: int, total_steps: int) -> bool:
        return step <= self._last_update(total_steps)

    def progress(self, step: int, total_steps: int) -> float:
        if step >= total_steps:
            return 1.0
        return progress(step, int(self.warmup * total_steps), self.annealing)

    def select(self, group: Group, step: int, total_steps: int) -> None:
        fraction = self.progress(step, total_steps)
        sites, budget = group.contenders(fraction)
        if not sites:
            return
        scores = group.scores(sites)
        selection = group.select(sites, scores, budget)
        if self.beta_scale == "relative":
            at_target = selection
            if fraction < 1.0:
                at_target = group.select(sites, scores, group.share.kept)
            group.numbers["scale"] = _scale(scores, at_target) / _THRESHOLD
        beta = self._beta(group, sites, step, total_steps)
        if group.share.rows:
            masks = [
                _soft_rows(s, h, budget, beta) for s, h in zip(scores, selection.masks, strict=True)
            ]
        else:
            masks = _soft_masks(group, sites, scores, budget, beta, selection.threshold)
        for site, mask, soft_mask in zip(sites, selection.masks, masks, strict=True):
            site.mask, site.tensors["soft"] = mask, soft_mask
        group.numbers["beta"] = beta

    def materialize(self, site: Site) -> Tensor:
        kept = torch.where(site.mask, site.tensors["soft"], 0.0)
        # Adding zero turns the -0.0 of pruned negative weights into +0.0.
        return (site.latent * site.spread(kept)).add_(0.0).to(site.latent.dtype)

    def pull_back(self, group: Group, sites: Sequence[Site], step: int, total_steps: int) -> None:
        if step >= self._last_update(total_steps):
            for site in sites:
                fixed = torch.where(site.mask, site.tensors["soft"], 0.0)
                _require_grad(site).mul_(site.spread(fixed).to(site.latent.dtype))
            return
        soft_masks = [site.tensors["soft"] for site in sites]
        spreads = [m * (1.0 - m) for m in soft_masks]
        upstream = [site.pool_product(_require_grad(site)) for site in sites]
        beta = group.numbers["beta"]
        if group.share.rows:
            terms = [
                soft.pull_back_rows(s, q, beta) for s, q in zip(spreads, upstream, strict=True)
            ]
        else:
            costs = [site.cost for site in sites]
            terms = soft.pull_back(spreads, upstream, costs, beta)
        for site, soft_mask, term in zip(sites, soft_masks, terms, strict=True):
            per_weight = site.spread(term * (site.cost / site.divisor))
            grad = _require_grad(site)
            grad.mul_(site.spread(soft_mask).to(grad.dtype))
            grad.add_((per_weight * site.latent.sign()).to(grad.dtype))

    def monitor(self, group: Group) -> dict[str, float]:
        return {key: group.numbers[key] for key in ("beta", "scale") if key in group.numbers}

    def _last_update(self, total_steps: int) -> int:
        return total_steps - int(self.finetune * total_steps)

    def _beta(
        self,
        group: Group,
        sites: Sequence[Site],
        step: int,
        total_steps: int,
    ) -> float:
        start, end = self.beta
        fraction = progress(step, self._last_update(total_steps), self.annealing)
        if self.beta_scale == "absolute":
            return interpolate(start, end * math.sqrt(_mean_unit_numel(sites)), fraction)
        return interpolate(start, end, fraction) / group.numbers["scale"]


def _soft_masks(
    group: Group,
    sites: Sequence[Site],
    scores: Sequence[Tensor],
    budget: float,
    beta: float,
    threshold: float,
) -> list[Tensor]:
    """Solve for the soft masks, starting from the soft threshold of the last step."""
    start = 0.0
    if "threshold" in group.numbers and math.isfinite(threshold):
        start = beta * (threshold - group.numbers["threshold"])
    packing = Packing(scores, [site.cost for site in sites])
    joined = packing.join(scores)
    dual = soft.solve(joined, packing.costs, budget, beta, threshold, start)
    if math.isfinite(dual.mu):
        group.numbers["threshold"] = dual.threshold
    return packing.split([dual.mask(s) for s in joined])


def _soft_rows(scores: Tensor, mask: Tensor, kept: float, beta: float) -> Tensor:
    """Return the soft mask of the rows of an N:M pattern, centred at each row's threshold."""
    if kept >= scores.shape[1]:
        return torch.ones_like(scores)
    threshold = torch.where(mask, scores, math.inf).amin(1, keepdim=True)
    return soft.soft_rows(scores, kept, beta, threshold)


def _scale(scores: Sequence[Tensor], selection: Selection) -> float:
    """Return the hard threshold, averaged over rows, or the mean score where that is zero."""
    threshold = selection.threshold
    if math.isnan(threshold):
        tops = [
            torch.where(mask, s, math.inf).amin(1)
            for s, mask in zip(scores, selection.masks, strict=True)
        ]
        threshold = float(torch.cat(tops).double().mean())
    if math.isfinite(threshold) and threshold > 0:
        return threshold
    mean = sum(float(s.sum(dtype=torch.float64)) for s in scores) / sum(s.numel() for s in scores)
    return mean or 1.0


def _mean_unit_numel(sites: Sequence[Site]) -> float:
    return sum(s.latent.numel() for s in sites) / sum(s.mask.numel() for s in sites)


def _require_grad(site: Site) -> Tensor:
    assert site.grad is not None
    return site.grad
