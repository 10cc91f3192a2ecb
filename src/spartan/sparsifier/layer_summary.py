"""`LayerSummary`: what a layer keeps of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spartan.methods.masking.masked_weight import MaskedWeight


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
        floor: Units that it keeps at least.
        soft: Whether kept weights are multiplied by a soft mask, or a gate, while masks move.
            Spartan decides it in the first steps: where a norm follows.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    units: int
    kept_units: int
    kept: int
    cost: float
    floor: int = 0
    soft: bool = False

    @property
    def density(self) -> float:
        """Kept fraction of the weights."""
        return self.kept / self.numel


def summarize(weight: MaskedWeight, kept_units: int, soft: bool) -> LayerSummary:
    """Return the row of a weight that keeps so many units, with or without a soft mask."""
    return LayerSummary(
        name=weight.name,
        shape=tuple(weight.prunable.shape),
        numel=weight.prunable.parameter.numel(),
        units=weight.units,
        kept_units=kept_units,
        kept=kept_units * weight.pattern.unit_numel(weight.prunable),
        cost=weight.cost,
        floor=weight.floor,
        soft=soft,
    )


def named(names: Sequence[str]) -> str:
    """Return a name for one or several weights."""
    return names[0] if len(names) == 1 else f"{len(names)} weights"
