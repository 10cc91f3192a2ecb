"""`Plan`: which layers `accelerate` runs sparse, with the times that were measured."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from spartan.deploy.timing import Timing

# N:M patterns that are told from zeros. The first that fits is named: 2:4 is not called 4:8.
_RATIOS = ((2, 4), (1, 4), (4, 8), (2, 8), (1, 8), (2, 16), (1, 16))


@dataclass(frozen=True)
class LayerPlan:
    """One layer.

    Attributes:
        name: In the model.
        shape: Of the weight.
        density: Share of the weights that are not zero.
        pattern: What the zeros look like: `unstructured`, `N:M`, `16 rows`, …
        format: `dense`, or what the sparse weights are stored as.
        dense: Time of the dense layer; None if it was not measured.
        sparse: Time of the fastest sparse layer; None if none was measured.
        note: Why no sparse layer was measured.
    """

    name: str
    shape: tuple[int, ...]
    density: float
    pattern: str
    format: str
    dense: Timing | None = None
    sparse: Timing | None = None
    note: str = ""

    def staying_dense(self, note: str) -> LayerPlan:
        """Return the same layer, dense."""
        return replace(self, format="dense", note=self.note or note)


@dataclass(frozen=True)
class Plan:
    """What `accelerate` did.

    Attributes:
        layers: The linear and convolution layers, in the order of the model.
        dense: Time of the model that was given.
        accelerated: Time of the model that was returned.
        threads: Threads used.
        kernels: Which kernels ran.
        traced: Whether the structure was seen, so that batch norms, additions and activations
            are fused.
        warnings: What makes these figures doubtful.
        untraced: Why nothing is fused, or nothing.
    """

    layers: list[LayerPlan]
    dense: Timing
    accelerated: Timing
    threads: int
    kernels: str
    traced: bool
    warnings: list[str] = field(default_factory=list)
    untraced: str = ""

    @property
    def speedup(self) -> float:
        """Time of the given model over that of the returned one."""
        return self.dense.median / self.accelerated.median

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self.layers)])
        head = f"{'layer':<{width}}  {'weight':>16}  density  {'pattern':<12}  {'runs as':<12}"
        lines = [*self.warnings, f"{head}  dense ms  sparse ms"]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            dense = f"{1e3 * layer.dense.median:8.3f}" if layer.dense else " " * 8
            sparse = f"{1e3 * layer.sparse.median:9.3f}" if layer.sparse else ""
            note = f" ({layer.note})" if layer.note else ""
            lines.append(
                f"{layer.name:<{width}}  {shape:>16}  {layer.density:7.2%}  {layer.pattern:<12}  "
                f"{layer.format:<12}  {dense}  {sparse}{note}"
            )
        lines.append(
            f"whole model: dense {self.dense}, accelerated {self.accelerated}: "
            f"{self.speedup:.2f}x; {self.threads} thread{'s' * (self.threads != 1)}, "
            f"kernels {self.kernels}"
        )
        if self.dense is self.accelerated:
            lines.append("Nothing is won: the result is a plain copy.")
        elif not self.traced:
            lines.append(f"Layers were replaced one by one, nothing was fused: {self.untraced}.")
        return "\n".join(lines)


def pattern_of(matrix: Tensor, height: int) -> str:
    """Say what the zeros of a matrix of (outputs, inputs) look like.

    Args:
        matrix: The weights.
        height: Rows found to share their columns.
    """
    if height > 1:
        return f"{height} rows"
    used = matrix != 0
    for n, m in _RATIOS:
        if used.shape[1] % m == 0 and used.numel():
            counts = used.view(len(used), -1, m).sum(2)
            if bool((counts == n).all()):
                return f"{n}:{m}"
    density = torch.count_nonzero(used) / max(1, used.numel())
    return "dense" if density == 1 else "unstructured"
