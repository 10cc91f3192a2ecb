"""`BudgetGroup` and `Competition`: weights that share a budget, and top-k among them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from spartan.budgets.group_budget import GroupBudget, RowBudget
from spartan.errors import NonFiniteError, StateError
from spartan.kernels import Cutoff, Dual, ScanRequest, ScanResult, Scores, finite, masks_of, scan
from spartan.kernels.scores import wide
from spartan.methods.masking.masked_weight import MaskedWeight, PendingMask
from spartan.methods.masking.state import Forecast, GroupState, WeightState
from spartan.selection.hard import find_cutoff, held_to_floors, select_rows
from spartan.selection.soft import DualSearch
from spartan.weights.patterns import Pattern
from spartan.weights.prunable import Prunable

_S = TypeVar("_S", bound=GroupState)


@dataclass(eq=False)
class BudgetGroup:
    """The weights that share one budget.

    Attributes:
        weights: All of them.
        budget: What they may keep together.
        state: What the method keeps of the group, saved with the run.
    """

    weights: list[MaskedWeight]
    budget: GroupBudget
    state: GroupState = field(default_factory=GroupState)

    def state_as(self, kind: type[_S]) -> _S:
        """Return the method's state of this group, typed."""
        assert isinstance(self.state, kind)
        return self.state

    def competition(self, progress: float) -> Competition:
        """Return the weights whose masks may move now, and the budget they compete for.

        There are three phases. While the budget shrinks, all weights take part that began as
        something: those that began as zeros would lose everything to them, and stay whole. At the
        first selection at the target all take part once more, also those without a gradient: they
        would keep what they had when the budget was larger. After it (`settled`), a weight without
        a gradient keeps its mask, and the others compete for what it leaves.
        """
        at_target = progress >= 1.0
        kind = RowCompetition if isinstance(self.budget, RowBudget) else Competition
        if not at_target:
            grown = [weight for weight in self.weights if not weight.newborn]
            budget = self.budget.at(progress)
            if len(grown) < len(self.weights) and kind is Competition:
                budget *= sum(w.cost * w.units for w in grown) / self.budget.total
                budget = float(round(budget)) if self.budget.counted else budget
            return kind(self, grown, budget, at_target)
        idle = [weight for weight in self.weights if not weight.active]
        if not idle or not self.state.settled:
            self.state.settled = True
            for weight in self.weights:
                weight.newborn = False
            return kind(self, self.weights, self.budget.at(progress), at_target)
        active = [weight for weight in self.weights if weight.active]
        left = self.budget.without(sum(weight.cost * weight.kept for weight in idle))
        return kind(self, active, left, at_target)

    def adopt(self, budget: GroupBudget) -> None:
        """Take another budget for the same weights, with other costs and floors."""
        floors = budget.floors or (0,) * len(self.weights)
        for weight, cost, floor in zip(self.weights, budget.costs, floors, strict=True):
            weight.divisor *= cost / weight.cost
            weight.cost, weight.floor = cost, floor
        self.budget = budget

    def lift_floors(self) -> None:
        """Let weights keep nothing."""
        self.budget = dataclasses.replace(self.budget, floors=())
        for weight in self.weights:
            weight.floor = 0

    @property
    def kept(self) -> float:
        """Cost of the kept units, in the currency of the budget; of rows, the fullest one's."""
        if isinstance(self.budget, RowBudget):
            return max(float(weight.mask.sum(dim=1).max()) for weight in self.weights)
        return sum(weight.cost * weight.kept for weight in self.weights)

    @property
    def at_budget(self) -> bool:
        """Whether the masks keep all that the budget allows: of dearer units, but for one unit."""
        if isinstance(self.budget, RowBudget):
            wanted = self.budget.kept
            return all(bool((weight.mask.sum(dim=1) == wanted).all()) for weight in self.weights)
        left = self.budget.kept - self.kept
        return left == 0 if self.budget.counted else 0 <= left < max(self.budget.costs)


def make_group(
    budget: GroupBudget,
    prunables: Sequence[Prunable],
    pattern: Pattern,
    group_state: type[GroupState] = GroupState,
    weight_state: type[WeightState] = WeightState,
) -> BudgetGroup:
    """Make the group of a budget, everything kept.

    Args:
        budget: The budget.
        prunables: All prunable weights, of which the budget names its members.
        pattern: How they divide into units.
        group_state: What the method keeps of the group.
        weight_state: What it keeps of each weight.

    Raises:
        StateError: The members lie on several devices.
    """
    members = [prunables[i] for i in budget.members]
    shapes = [pattern.unit_shape(w) for w in members]
    units = sum(math.prod(shape) for shape in shapes)
    mean_numel = sum(w.parameter.numel() for w in members) / units
    floors = budget.floors or (0,) * len(members)
    if len({one.parameter.device for one in members}) > 1:
        raise StateError(
            "The prunable weights lie on several devices, and a budget is solved on one: use "
            "allocation='uniform', or put the model on one device."
        )
    weights = [
        MaskedWeight(
            prunable=prunable,
            pattern=pattern,
            cost=cost,
            divisor=cost * mean_numel,
            floor=floor,
            latent=prunable.parameter.detach().clone(),
            stored_mask=_everything(prunable.parameter, shape),
            state=weight_state(),
        )
        for prunable, cost, floor, shape in zip(members, budget.costs, floors, shapes, strict=True)
    ]
    return BudgetGroup(weights, budget, group_state())


def _everything(parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a mask that keeps all units, in the memory order of the weight if it has its shape."""
    if shape == parameter.shape:
        return torch.ones_like(parameter, dtype=torch.bool, requires_grad=False)
    return torch.ones(shape, dtype=torch.bool, device=parameter.device)


@dataclass(frozen=True)
class Competition:
    """Weights whose masks may move now, and the budget their units compete for.

    Attributes:
        group: The group they belong to.
        weights: The weights.
        budget: What they may keep together.
        at_target: Whether the target density has been reached.
    """

    group: BudgetGroup
    weights: list[MaskedWeight]
    budget: float
    at_target: bool

    @cached_property
    def scores(self) -> Scores:
        """The score of each unit: mean |θ| per relative cost."""
        return self._scores_of(
            [w.theta if self._elementwise else w.magnitudes() for w in self.weights]
        )

    @cached_property
    def floors(self) -> list[int]:
        """Units that each weight keeps at least; empty where none has a floor, or all do not fit.

        They do not fit where weights that are not trained hold most of the budget.
        """
        floors = [weight.floor for weight in self.weights]
        needed = sum(weight.floor * weight.cost for weight in self.weights)
        return floors if any(floors) and needed <= self.budget else []

    def _scores_of(self, pooled: Sequence[Tensor]) -> Scores:
        scales, costs = [w.scale for w in self.weights], [w.cost for w in self.weights]
        return Scores(pooled, scales, costs, absolute=True)

    @cached_property
    def _elementwise(self) -> bool:
        return all(weight.elementwise for weight in self.weights)

    @property
    def mean_unit_numel(self) -> float:
        """Weights per unit, on average."""
        return sum(w.latent.numel() for w in self.weights) / sum(w.units for w in self.weights)

    def request(
        self, bracket: tuple[float, float], search: DualSearch | None = None
    ) -> ScanRequest:
        """Ask what the budget keeps.

        Args:
            bracket: Where the threshold is expected.
            search: The search for a soft mask, which wants to know its mass.
        """
        wanted = None if search is None or search.done else search.dual
        dropped = search is not None and search.dropped
        counted = bool(self.floors)
        return ScanRequest(self.scores, self.budget, bracket, wanted, dropped, counted=counted)

    def largest(self, budget: float, pooled: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return masks of the units of largest score that fit a budget.

        Args:
            budget: What may be kept.
            pooled: For each weight, what its units are scored by instead of the sum of their |θ|.
        """
        scores = self.scores if pooled is None else self._scores_of(pooled)
        return masks_of(scores, find_cutoff(scores, budget, self.floors))

    def keep(self, cutoff: Cutoff, dual: Dual | None = None) -> None:
        """Let masks keep what a cutoff does, with the soft mask of `dual` if there is one.

        Where every weight is a unit, masks follow when w is next written, in one pass, or when they
        are next read.
        """
        if self._elementwise and len({wide(w.latent[:0]).dtype for w in self.weights}) == 1:
            for i, weight in enumerate(self.weights):
                threshold, tie_end = cutoff.of(i)
                centred = None if dual is None else dual.centred(threshold)
                weight.pending = PendingMask(threshold, tie_end, centred)
            return
        masks = masks_of(self.scores, cutoff)
        for i, (weight, mask) in enumerate(zip(self.weights, masks, strict=True)):
            weight.mask = mask
            centred = None if dual is None else dual.centred(cutoff.of(i)[0])
            weight.dual = centred if self._elementwise else None

    def unit_scores(self) -> list[Tensor]:
        """Return the score of each unit of each weight."""
        return [self.scores.of(x, i) for i, x in enumerate(self.scores.tensors)]


@dataclass(frozen=True)
class RowCompetition(Competition):
    """The same for N:M patterns: in every row of a weight `budget` units stay."""

    def largest(self, budget: float, pooled: Sequence[Tensor] | None = None) -> list[Tensor]:
        scored = [w.magnitudes() for w in self.weights] if pooled is None else pooled
        return [select_rows(x, round(budget)) for x in scored]


def competitions_of(groups: Sequence[BudgetGroup], progress: float) -> list[Competition]:
    """Return the competition of each group that has one."""
    competitions = [group.competition(progress) for group in groups]
    return [competition for competition in competitions if competition.weights]


def by_rows(
    competitions: Sequence[Competition],
) -> tuple[list[Competition], list[Competition]]:
    """Return those of N:M patterns, whose rows are decided one by one, and the others."""
    rows = [c for c in competitions if isinstance(c, RowCompetition)]
    return [*rows], [c for c in competitions if not isinstance(c, RowCompetition)]


def keep_largest(competitions: Sequence[Competition]) -> None:
    """Keep the units of largest mean |θ| that fit each budget."""
    rows, others = by_rows(competitions)
    require_finite([weight for competition in rows for weight in competition.weights])
    for competition in rows:
        masks = competition.largest(competition.budget)
        for weight, mask in zip(competition.weights, masks, strict=True):
            weight.mask = mask
    for competition, cutoff in zip(others, find_cutoffs(others), strict=True):
        competition.keep(cutoff)


def find_cutoffs(competitions: Sequence[Competition]) -> list[Cutoff]:
    """Find what each budget keeps, starting from the thresholds of the last time."""
    thresholds = [competition.group.state.threshold for competition in competitions]
    return _scan_at(competitions, thresholds)


def keep_counts(
    competition: Competition, counts: Sequence[int], thresholds: Sequence[Forecast]
) -> None:
    """Keep so many units of each weight, those of largest mean |θ|.

    Args:
        competition: The weights.
        counts: How many units of each.
        thresholds: The cutoff score of each, remembered for the next time.
    """
    alone = [
        Competition(competition.group, [weight], count * weight.cost, competition.at_target)
        for weight, count in zip(competition.weights, counts, strict=True)
    ]
    for one, cutoff in zip(alone, _scan_at(alone, thresholds), strict=True):
        one.keep(cutoff)


def _scan_at(competitions: Sequence[Competition], thresholds: Sequence[Forecast]) -> list[Cutoff]:
    requests = [
        competition.request(threshold.bracket)
        for competition, threshold in zip(competitions, thresholds, strict=True)
    ]
    cutoffs = [result.cutoff for result in scan_scores(competitions, requests)]
    for threshold, cutoff in zip(thresholds, cutoffs, strict=True):
        threshold.remember(cutoff.threshold)
    return cutoffs


def scan_scores(
    competitions: Sequence[Competition], requests: Sequence[ScanRequest]
) -> list[ScanResult]:
    """Scan the scores of competitions, all with one look at the weights.

    Where weights would fall below their floors, a few more looks follow.

    Raises:
        NonFiniteError: A weight is NaN or infinite; nothing has been changed.
    """
    results = scan(requests)
    for competition, result in zip(competitions, results, strict=True):
        if not result.finite:
            require_finite(competition.weights)
    for i, (competition, request) in enumerate(zip(competitions, requests, strict=True)):
        if request.counted:
            cutoff = held_to_floors(request, results[i], competition.floors)
            results[i] = dataclasses.replace(results[i], cutoff=cutoff)
    return results


def require_finite(weights: Sequence[MaskedWeight]) -> None:
    """Raise `NonFiniteError` if θ of a weight holds NaN or infinity."""
    broken = [
        w.name for w, ok in zip(weights, finite([w.theta for w in weights]), strict=True) if not ok
    ]
    if broken:
        raise NonFiniteError(
            f"{', '.join(map(repr, broken))} became NaN or infinite; the prunable weights are as "
            "before the step. Lower the learning rate or clip."
        )
