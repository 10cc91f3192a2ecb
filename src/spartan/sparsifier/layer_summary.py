"""`LayerSummary`: what each layer keeps, counted in its mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spartan.methods.masking.groups import BudgetGroup
from spartan.weights.patterns import Pattern


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


def summarize_masks(groups: Sequence[BudgetGroup], pattern: Pattern) -> list[LayerSummary]:
    """Return one row per prunable weight, group by group."""
    return [
        LayerSummary(
            name=weight.name,
            shape=tuple(weight.prunable.shape),
            numel=weight.prunable.parameter.numel(),
            units=weight.mask.numel(),
            kept_units=(kept := weight.kept),
            kept=kept * pattern.unit_numel(weight.prunable),
            cost=weight.cost,
        )
        for group in groups
        for weight in group.weights
    ]


def named(names: Sequence[str]) -> str:
    """Return a name for one or several weights."""
    return names[0] if len(names) == 1 else f"{len(names)} weights"
