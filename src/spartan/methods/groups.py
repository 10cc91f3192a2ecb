"""The sites that share one budget, and how they compete for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from spartan.errors import NonFiniteError, StateError
from spartan.kernels import Cut, Dual, Request, Result, Scores, finite, masks_of, scan
from spartan.kernels.scores import wide
from spartan.methods.forecast import bracket, remember
from spartan.methods.sites import Choice, Site
from spartan.patterns import Pattern
from spartan.prunable import Prunable
from spartan.selection.hard import select_rows
from spartan.shares import Share


@dataclass(eq=False)
class Group:
    """The sites that share one budget.

    Attributes:
        sites: All of them.
        share: The budget.
        numbers: What the method keeps per group (dual variables, …), saved with the state.
    """

    sites: list[Site]
    share: Share
    numbers: dict[str, float] = field(default_factory=dict)

    def contest(self, progress: float) -> Contest:
        """Return the sites whose masks may move now, and the budget they compete for.

        Once the target density is reached, a site without a gradient keeps its mask, and the
        others share what it leaves; before, the budget shrinks every step and all take part.
        """
        budget = self.share.at(progress)
        idle = [site for site in self.sites if not site.active]
        if progress < 1.0 or not idle or "settled" not in self.numbers:
            if progress >= 1.0:
                self.numbers["settled"] = 1.0
            return Contest(self, self.sites, budget, progress >= 1.0)
        active = [site for site in self.sites if site.active]
        if not self.share.rows:
            budget -= sum(site.cost * site.kept for site in idle)
        return Contest(self, active, budget, at_target=True)

    def adopt(self, share: Share) -> None:
        """Take another budget for the same sites, with other costs."""
        for site, cost in zip(self.sites, share.costs, strict=True):
            site.divisor *= cost / site.cost
            site.cost = cost
        self.share = share

    @property
    def kept(self) -> float:
        """Cost of the kept units, in the currency of the share."""
        if self.share.rows:
            return max(float(site.mask.sum(dim=1).max()) for site in self.sites)
        return sum(site.cost * site.kept for site in self.sites)


def make_group(share: Share, weights: Sequence[Prunable], pattern: Pattern) -> Group:
    """Make the group of a share, everything kept.

    Args:
        share: The budget.
        weights: All prunable weights, of which the share names its members.
        pattern: How they divide into units.

    Raises:
        StateError: The members lie on several devices.
    """
    members = [weights[i] for i in share.members]
    shapes = [pattern.unit_shape(w) for w in members]
    units = sum(math.prod(shape) for shape in shapes)
    mean_numel = sum(w.parameter.numel() for w in members) / units
    if len({weight.parameter.device for weight in members}) > 1:
        raise StateError(
            "The prunable weights lie on several devices, and a budget is solved on one: use "
            "allocation='uniform', or put the model on one device."
        )
    sites = [
        Site(
            weight=weight,
            pattern=pattern,
            cost=cost,
            divisor=cost * mean_numel,
            latent=weight.parameter.detach().clone(),
            stored_mask=_everything(weight.parameter, shape),
        )
        for weight, cost, shape in zip(members, share.costs, shapes, strict=True)
    ]
    return Group(sites, share)


def _everything(parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a mask that keeps all units, in the memory order of the weight if it has its shape."""
    if shape == parameter.shape:
        return torch.ones_like(parameter, dtype=torch.bool, requires_grad=False)
    return torch.ones(shape, dtype=torch.bool, device=parameter.device)


@dataclass(frozen=True)
class Contest:
    """Sites whose masks may move now, and the budget they compete for.

    Attributes:
        group: The group they belong to.
        sites: The sites.
        budget: What they may keep together.
        at_target: Whether the target density has been reached.
    """

    group: Group
    sites: list[Site]
    budget: float
    at_target: bool

    @cached_property
    def scores(self) -> Scores:
        """The score of each unit: mean |θ| per relative cost."""
        return Scores(
            [site.theta if self._elementwise else site.magnitudes() for site in self.sites],
            [site.scale for site in self.sites],
            [site.cost for site in self.sites],
            absolute=True,
        )

    @property
    def _elementwise(self) -> bool:
        return all(site.elementwise for site in self.sites)

    def masks(self, cut: Cut) -> list[Tensor]:
        """Return which units a cut keeps."""
        return masks_of(self.scores, cut)

    @property
    def mean_unit_numel(self) -> float:
        """Weights per unit, on average."""
        return sum(s.latent.numel() for s in self.sites) / sum(s.units for s in self.sites)

    def keep(self, cut: Cut, dual: Dual | None = None) -> None:
        """Choose what a cut keeps, with the soft mask of `dual` if there is one.

        Where every weight is a unit, masks follow when the weights are next written, in one pass,
        or when they are next read.
        """
        if self._elementwise and len({wide(site.latent[:0]).dtype for site in self.sites}) == 1:
            for site, stop in zip(self.sites, cut.stops, strict=True):
                site.choice = Choice(cut.threshold, stop, dual)
            return
        for i, (site, mask) in enumerate(zip(self.sites, self.masks(cut), strict=True)):
            site.mask = mask
            site.dual = dual if self._elementwise else None
            if dual is not None and not self._elementwise:
                site.tensors["soft"] = dual.mask(self.scores.of(self.scores.tensors[i], i))


def contests_of(groups: Sequence[Group], progress: float) -> list[Contest]:
    """Return the contest of each group that has one."""
    contests = [group.contest(progress) for group in groups]
    return [contest for contest in contests if contest.sites]


def keep_largest(contests: Sequence[Contest]) -> None:
    """Keep the units of largest mean |θ| that fit each budget."""
    rows = [contest for contest in contests if contest.group.share.rows]
    require_finite([site for contest in rows for site in contest.sites])
    for contest in rows:
        for site in contest.sites:
            site.mask = select_rows(site.magnitudes(), round(contest.budget))
    others = [contest for contest in contests if not contest.group.share.rows]
    for contest, cut in zip(others, find_cuts(others), strict=True):
        contest.keep(cut)


def find_cuts(contests: Sequence[Contest]) -> list[Cut]:
    """Find what each budget keeps, starting from the thresholds of the last time."""
    requests = [
        Request(c.scores, c.budget, bracket(c.group.numbers, "threshold")) for c in contests
    ]
    cuts = [result.cut for result in look(contests, requests)]
    for contest, cut in zip(contests, cuts, strict=True):
        remember(contest.group.numbers, "threshold", cut.threshold)
    return cuts


def keep_counts(contest: Contest, counts: Sequence[int]) -> None:
    """Keep so many units of each site, those of largest mean |θ|.

    The score at which a site is cut is remembered in its group's numbers, as `threshold NAME`.
    """
    numbers = contest.group.numbers
    alone = [
        Contest(contest.group, [site], count * site.cost, contest.at_target)
        for site, count in zip(contest.sites, counts, strict=True)
    ]
    keys = [f"threshold {site.name}" for site in contest.sites]
    requests = [
        Request(c.scores, c.budget, bracket(numbers, key))
        for c, key in zip(alone, keys, strict=True)
    ]
    for one, key, result in zip(alone, keys, look(alone, requests), strict=True):
        one.keep(result.cut)
        remember(numbers, key, result.cut.threshold)


def look(contests: Sequence[Contest], requests: Sequence[Request]) -> list[Result]:
    """Scan the scores of contests.

    Raises:
        NonFiniteError: A weight is NaN or infinite; nothing has been changed.
    """
    results = scan(requests)
    for contest, result in zip(contests, results, strict=True):
        if not result.finite:
            require_finite(contest.sites)
    return results


def require_finite(sites: Sequence[Site]) -> None:
    """Raise `NonFiniteError` if θ of a site holds NaN or infinity."""
    broken = [
        s.name for s, ok in zip(sites, finite([s.theta for s in sites]), strict=True) if not ok
    ]
    if broken:
        raise NonFiniteError(
            f"{', '.join(map(repr, broken))} became NaN or infinite; the prunable weights are as "
            "before the step. Lower the learning rate or clip."
        )
