"""What a model keeps, layer by layer, counted and not computed from a setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spartan.methods.groups import Group
from spartan.patterns import Pattern


@dataclass(frozen=True)
class LayerSummary:
    """One prunable weight.

    Attributes:
        name: Name of the parameter.
        shape: Its shape.
        numel: Number of weights.
        units: Number of units the pattern makes of them.
        kept_units: Units kept.
        kept: Weights in kept units.
        cost: Relative cost of one unit in its budget group.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    units: int
    kept_units: int
    kept: int
    cost: float

    @property
    def density(self) -> float:
        """Kept fraction of the weights."""
        return self.kept / self.numel


def summarize_masks(groups: Sequence[Group], pattern: Pattern) -> list[LayerSummary]:
    """Return one row per prunable weight, group by group."""
    return [
        LayerSummary(
            name=site.name,
            shape=tuple(site.weight.shape),
            numel=site.weight.parameter.numel(),
            units=site.mask.numel(),
            kept_units=(kept := site.kept),
            kept=kept * pattern.unit_numel(site.weight),
            cost=site.cost,
        )
        for group in groups
        for site in group.sites
    ]
