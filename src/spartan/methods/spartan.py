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

from spartan import kernels
from spartan.errors import MethodError
from spartan.kernels import Request, units
from spartan.kernels.readback import read_back
from spartan.methods.base import Method, scale_gradients
from spartan.methods.forecast import bracket, forecast, remember
from spartan.methods.groups import Contest, Group, contests_of, find_cuts, keep_largest, look
from spartan.methods.sites import Site
from spartan.methods.writing import project, write_kept, write_scaled
from spartan.schedules import check_annealing, check_fraction, check_order, interpolate, progress
from spartan.selection import soft
from spartan.selection.soft import DualSearch

# Where relative β puts the hard threshold at the target density.
_THRESHOLD = 0.2
# Below, a threshold counts as zero: β, which grows as it falls, must stay within float32.
_TINY = 1e-30


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

    checks_weights: ClassVar[bool] = True
    name: ClassVar[str] = "spartan"
    summary: ClassVar[str] = (
        "the default: soft masks, dense gradients; robust up to high sparsities"
    )
    paper: ClassVar[str] = "Tai et al., NeurIPS 2022"
    step_cost: ClassVar[str] = "four to six passes over the weights, native on the CPU"

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

    def select(self, groups: Sequence[Group], step: int, total_steps: int) -> None:
        contests = contests_of(groups, self.progress(step, total_steps))
        self._select_rows([c for c in contests if c.group.share.rows], step, total_steps)
        self._select_units([c for c in contests if not c.group.share.rows], step, total_steps)
        if step >= self._last_update(total_steps):
            for group in groups:
                for site in group.sites:
                    _fix(site)

    def _select_units(self, contests: Sequence[Contest], step: int, total_steps: int) -> None:
        """Find hard and soft masks of groups, in steady state with one look at the weights."""
        find_cuts([c for c in contests if "threshold" not in c.group.numbers])
        self._find_scales([c for c in contests if "scale" not in c.group.numbers])
        searches = [self._search(contest, step, total_steps) for contest in contests]
        requests = [
            Request(
                contest.scores,
                contest.budget,
                bracket(contest.group.numbers, "threshold"),
                None if search.done else search.dual,
                search.dropped,
            )
            for contest, search in zip(contests, searches, strict=True)
        ]
        # The scale of the next step. Before the target is reached, its threshold is another one.
        early = [c for c in contests if self.beta_scale == "relative" and not c.at_target]
        results = look([*contests, *early], [*requests, *map(_at_target, early)])
        for search, result in zip(searches, results, strict=False):
            if result.mass is not None:
                search.take(result.mass)
        soft.solve_all(searches)

        for contest, search, result in zip(contests, searches, results, strict=False):
            numbers = contest.group.numbers
            contest.keep(result.cut, search.dual)
            remember(numbers, "threshold", result.cut.threshold)
            remember(numbers, "soft", search.dual.threshold)
            numbers["beta"] = search.dual.beta
            if contest.at_target:
                numbers["scale"] = _scale(contest, result.cut.threshold)
        for contest, result in zip(early, results[len(contests) :], strict=True):
            remember(contest.group.numbers, "target", result.cut.threshold)
            contest.group.numbers["scale"] = _scale(contest, result.cut.threshold)

    def _find_scales(self, contests: Sequence[Contest]) -> None:
        if self.beta_scale == "relative":
            results = look(contests, [_at_target(contest) for contest in contests])
            for contest, result in zip(contests, results, strict=True):
                contest.group.numbers["scale"] = _scale(contest, result.cut.threshold)

    def _search(self, contest: Contest, step: int, total_steps: int) -> DualSearch:
        """Start the search for the soft mask where its threshold is expected."""
        numbers = contest.group.numbers
        beta = self._beta(contest, step, total_steps)
        reference, expected = numbers.get("threshold", 0.0), forecast(numbers, "soft")
        start = 0.0 if expected is None else beta * (reference - expected)
        return DualSearch(contest.scores, contest.budget, beta, reference, start)

    def _select_rows(self, contests: Sequence[Contest], step: int, total_steps: int) -> None:
        """Find the masks of N:M patterns, where each row is a group of its own."""
        keep_largest(contests)
        tops = [[_row_thresholds(site) for site in contest.sites] for contest in contests]
        if self.beta_scale == "relative" and contests:
            means = read_back([torch.cat(top).double().mean().reshape(1) for top in tops])
            for contest, (mean,) in zip(contests, means, strict=True):
                contest.group.numbers["scale"] = _scale(contest, mean)
        for contest, thresholds in zip(contests, tops, strict=True):
            beta = self._beta(contest, step, total_steps)
            contest.group.numbers["beta"] = beta
            for site, threshold in zip(contest.sites, thresholds, strict=True):
                site.tensors["soft"] = soft.soft_rows(
                    site.scores(), round(contest.budget), beta, threshold
                )

    def write(self, sites: Sequence[Site]) -> None:
        write_kept([site for site in sites if "soft" not in site.tensors])
        stored = [site for site in sites if "soft" in site.tensors]
        for site in stored:
            if not site.elementwise:
                write_scaled(site, torch.where(site.mask, site.tensors["soft"], 0.0))
        fixed = [site for site in stored if site.elementwise]
        if fixed:
            write_kept(fixed)
            weights = [site.parameter for site in fixed]
            torch._foreach_mul_(weights, [site.tensors["soft"] for site in fixed])

    def materialize(self, site: Site) -> Tensor:
        if "soft" not in site.tensors:
            site.resolve()
            weight = torch.empty_like(site.latent)
            project([site], [weight])
            return weight
        kept = torch.where(site.mask, site.tensors["soft"], 0.0)
        # Adding zero turns the -0.0 of pruned negative weights into +0.0.
        return (site.theta * site.spread(kept)).add_(0.0).to(site.latent.dtype)

    def pull_back(self, group: Group, sites: Sequence[Site], step: int, total_steps: int) -> None:
        if step >= self._last_update(total_steps):
            scale_gradients(sites, [site.tensors["soft"] for site in sites])
        elif all(site.dual is not None for site in sites):
            kernels.pull_back(
                [site.required_grad for site in sites],
                [site.latent for site in sites],
                [site.scale for site in sites],
                [site.cost for site in sites],
                [site.dual for site in sites if site.dual is not None],
            )
        else:
            _pull_back_units(group, sites)

    def monitor(self, group: Group) -> dict[str, float]:
        return {key: group.numbers[key] for key in ("beta", "scale") if key in group.numbers}

    def _last_update(self, total_steps: int) -> int:
        return total_steps - int(self.finetune * total_steps)

    def _beta(self, contest: Contest, step: int, total_steps: int) -> float:
        start, end = self.beta
        fraction = progress(step, self._last_update(total_steps), self.annealing)
        if self.beta_scale == "absolute":
            return interpolate(start, end * math.sqrt(contest.mean_unit_numel), fraction)
        return interpolate(start, end, fraction) / contest.group.numbers["scale"]


def _at_target(contest: Contest) -> Request:
    """Ask for the threshold at the target density."""
    group = contest.group
    expected = bracket(group.numbers, "target")
    return Request(contest.scores, group.share.kept, expected, threshold_only=True)


def _scale(contest: Contest, threshold: float) -> float:
    """Return what scores are divided by; the mean score stands in for a threshold of zero."""
    if not _TINY < threshold < math.inf:
        sums = [site.scores().sum(dtype=torch.float64) for site in contest.sites]
        threshold = float(torch.stack(sums).sum()) / sum(
            s.stored_mask.numel() for s in contest.sites
        )
    return (threshold if threshold > _TINY else 1.0) / _THRESHOLD


def _row_thresholds(site: Site) -> Tensor:
    """Return the smallest kept score of each row."""
    return torch.where(site.mask, site.scores(), math.inf).amin(1, keepdim=True)


def _fix(site: Site) -> None:
    """Store m · h, which from now on stays what it is."""
    site.resolve()
    site.tensors["soft"] = torch.where(site.mask, site.soft_mask(), 0.0)
    site.dual = None


def _pull_back_units(group: Group, sites: Sequence[Site]) -> None:
    """Pull back where a unit has many weights, or a budget of its own for each row."""
    soft_masks = [site.tensors["soft"] for site in sites]
    spreads = [m * (1.0 - m) for m in soft_masks]
    upstream = [site.pool_product(site.required_grad) for site in sites]
    beta = group.numbers["beta"]
    if group.share.rows:
        terms = [soft.pull_back_rows(s, q, beta) for s, q in zip(spreads, upstream, strict=True)]
    else:
        terms = soft.pull_back(spreads, upstream, [site.cost for site in sites], beta)
    for site, m, term in zip(sites, soft_masks, terms, strict=True):
        term.mul_(site.cost / site.divisor)
        units.pull_back_units(site.required_grad, site.latent, m, term, site.grid)
