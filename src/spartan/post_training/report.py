"""`CompressionReport`: kept weights, errors, loss and times of a compression."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LayerReport:
    """One prunable weight after a compression.

    Attributes:
        name: Name of the parameter.
        shape: Its shape.
        numel: Number of weights.
        nonzero: Weights that are not zero, counted.
        units: Units of the pattern.
        kept_units: Units with a weight that is not zero.
        cost: Relative cost of one unit.
        error: |W₀ X₀ - W X|² / |W₀ X₀|² on the calibration data before any distillation: of its
            outputs, with what the pruned layers before it give. NaN where no layer was solved, or
            no sample reaches it.
        seconds: Time its solution took.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    nonzero: int
    units: int
    kept_units: int
    cost: float
    error: float
    seconds: float

    @property
    def density(self) -> float:
        """Fraction of the weights that are not zero."""
        return self.nonzero / self.numel

    @property
    def rate(self) -> float:
        """Sparsity: fraction of the weights that are zero."""
        return 1.0 - self.density


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did, counted in the weights.

    Attributes:
        model: The compressed model, in the training mode of the one that was given.
        layers: Its prunable weights.
        settings: What was asked for, and what was chosen where nothing was.
        loss: Divergence from the dense network on the held-out samples, in the end.
        samples: Calibration samples: those compressed with, and those held out.
        phases: Seconds of each phase.
        rows: What was measured during a distillation: step, loss, density, held-out loss.
        step: Step of the distillation that the weights are of; 0 without one.
        unreached: Weights that no calibration sample reaches.
    """

    model: nn.Module
    layers: list[LayerReport]
    settings: dict[str, Any]
    loss: float
    samples: tuple[int, int]
    phases: dict[str, float]
    rows: list[dict[str, float]] = field(repr=False)
    step: int
    unreached: list[str]

    @property
    def numel(self) -> int:
        """All prunable weights."""
        return sum(layer.numel for layer in self.layers)

    @property
    def nonzero(self) -> int:
        """Prunable weights that are not zero."""
        return sum(layer.nonzero for layer in self.layers)

    @property
    def density(self) -> float:
        """Kept fraction of the prunable weights."""
        return self.nonzero / self.numel

    @property
    def sparsity(self) -> float:
        """Zero fraction of the prunable weights."""
        return 1.0 - self.density

    @property
    def seconds(self) -> float:
        """Time of the whole compression."""
        return sum(self.phases.values())

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'weight':{width}}  {'kept':>11} {'of':>11} {'sparsity':>9} {'error':>9}"]
        lines += [
            f"{x.name:{width}}  {x.nonzero:11,} {x.numel:11,} {x.rate:9.2%} {x.error:9.2e}"
            for x in self.layers
        ]
        lines.append(
            f"{'all':{width}}  {self.nonzero:11,} {self.numel:11,} {self.sparsity:9.4%} in "
            f"{self.seconds:.1f} s, held-out loss {self.loss:.4g}"
        )
        return "\n".join(lines)
