"""The contract between a method and the sparsifier.

The sparsifier owns the parameters, the optimizer hooks and the step counter. A method says

* when masks move, and how far the density has come (`moves_masks`, `progress`),
* which units the masks keep (`select`),
* how the latent weight θ becomes the weight w the model computes with (`materialize`),
* how the gradient of w becomes the gradient of θ (`pull_back`).

It sees groups of sites: a `Site` is one prunable weight, a `Group` is the sites that share one
budget. Methods are frozen dataclasses of settings; whatever changes during a run lives in the
sites and groups, from where the sparsifier saves it.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from spartan.budget import Share
from spartan.patterns import Pattern
from spartan.prunable import Prunable
from spartan.selection import hard
from spartan.selection.hard import Selection
from spartan.selection.packing import Packing


@dataclass(eq=False)
class Site:
    """One prunable weight during a run.

    Attributes:
        weight: The parameter and its name.
        pattern: How it divides into units.
        cost: What one unit takes from the group's budget.
        divisor: What the pooled |θ| of a unit is divided by to be its score: the mean |θ| of the
            unit, per relative cost of a weight.
        latent: θ, dense, in the shape and dtype of the parameter.
        mask: Kept units, boolean, in the pattern's unit shape.
        tensors: What the method keeps per weight (soft masks, …), saved with the state.
        active: Whether the parameter had a gradient in the current step.
    """

    weight: Prunable
    pattern: Pattern
    cost: float
    divisor: float
    latent: Tensor
    mask: Tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)
    active: bool = True

    @property
    def name(self) -> str:
        """Name of the parameter."""
        return self.weight.name

    @property
    def kept(self) -> int:
        """Number of kept units."""
        return int(torch.count_nonzero(self.mask))

    @property
    def grad(self) -> Tensor | None:
        """Gradient of the parameter: of w before `pull_back`, of θ after it."""
        return self.weight.parameter.grad

    def scores(self) -> Tensor:
        """Return the score of each unit, mean |θ| per relative cost, in float32 or float64."""
        magnitude = _wide(self.latent).abs()
        pooled = self.pattern.pool(magnitude, self.weight)
        return pooled if self.divisor == 1.0 else pooled / self.divisor

    def spread(self, units: Tensor) -> Tensor:
        """Repeat unit values over the weight's shape."""
        return self.pattern.spread(units, self.weight)

    def pool_product(self, x: Tensor) -> Tensor:
        """Sum x · θ over each unit, in float32 or float64."""
        return self.pattern.pool(_wide(x) * self.latent, self.weight)


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

    def contenders(self, progress: float) -> tuple[list[Site], float]:
        """Return the sites whose masks may move now, and the budget they compete for.

        Once the target density is reached, a site without a gradient keeps its mask, and the
        others share what it leaves; before, the budget shrinks every step and all take part.
        """
        budget = self.share.at(progress)
        idle = [site for site in self.sites if not site.active]
        if progress < 1.0 or not idle or "settled" not in self.numbers:
            if progress >= 1.0:
                self.numbers["settled"] = 1.0
            return self.sites, budget
        if self.share.rows:
            return [site for site in self.sites if site.active], budget
        spent = sum(site.cost * site.kept for site in idle)
        return [site for site in self.sites if site.active], budget - spent

    def scores(self, sites: Sequence[Site]) -> list[Tensor]:
        """Return the scores of some sites in one dtype, so that they can be compared."""
        scores = [site.scores() for site in sites]
        if any(score.dtype == torch.float64 for score in scores):
            return [score.double() for score in scores]
        return scores

    def select(self, sites: Sequence[Site], scores: Sequence[Tensor], budget: float) -> Selection:
        """Select the units with the highest scores that fit the budget."""
        if not self.share.rows:
            packing = Packing(scores, [site.cost for site in sites])
            joined = hard.select(packing.join(scores), packing.costs, budget)
            return Selection(packing.split(joined.masks), joined.threshold)
        return Selection([hard.select_rows(s, round(budget)) for s in scores], math.nan)

    @property
    def kept(self) -> float:
        """Cost of the kept units, in the currency of the share."""
        if self.share.rows:
            return max(float(site.mask.sum(dim=1).max()) for site in self.sites)
        return sum(site.cost * site.kept for site in self.sites)


class Method(ABC):
    """Base of all methods. Subclasses are frozen dataclasses; their fields are the settings."""

    scheduled: ClassVar[bool] = True  # whether it needs to know the length of the run
    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]

    @abstractmethod
    def moves_masks(self, step: int, total_steps: int) -> bool:
        """Say whether the masks are selected anew after `step` (0: when attached)."""

    @abstractmethod
    def progress(self, step: int, total_steps: int) -> float:
        """Say how far the density has come after `step`: from everything, 0, to the budget, 1."""

    @abstractmethod
    def select(self, group: Group, step: int, total_steps: int) -> None:
        """Set the masks of a group from its latent weights.

        At `step == total_steps` the masks must meet the target budget.
        """

    @abstractmethod
    def pull_back(self, group: Group, sites: Sequence[Site], step: int, total_steps: int) -> None:
        """Turn the gradients of w into gradients of θ, in place.

        Args:
            group: Group of the sites.
            sites: Its sites that have a gradient and are about to be stepped.
            step: Steps completed so far.
            total_steps: Steps of the whole run.
        """

    def materialize(self, site: Site) -> Tensor:
        """Return w, with exact zeros in pruned units. Default: θ where kept."""
        return torch.where(site.spread(site.mask), site.latent, 0.0)

    def monitor(self, group: Group) -> dict[str, float]:
        """Return numbers worth logging for a group."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return the method's name and settings as plain values."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        return {"name": self.name, **plain}


def mask_gradients(sites: Sequence[Site], masks: Sequence[Tensor]) -> None:
    """Zero the gradients outside the masks (one boolean per unit), in place."""
    for site, mask in zip(sites, masks, strict=True):
        assert site.grad is not None
        site.grad.masked_fill_(~site.spread(mask), 0.0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
