r"""Update rules of Lagrange multipliers: ascent with restarts, νPI, multiplicative (GECO).

    minimise f(x)  subject to  g(x) <= 0,      L(x, λ) = f(x) + λ g(x),  λ >= 0

x descends on L while λ ascends, with the violation e_t = g(x_t) as its gradient. Here are the rules
for λ; each is a pure function, whose memory the caller keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class DualRule(Protocol):
    """How a multiplier moves."""

    def update(
        self, multiplier: float, violation: float, memory: float | None
    ) -> tuple[float, float]:
        """Return the next multiplier and memory; `memory` is None before the first step."""
        ...


@dataclass(frozen=True)
class Ascent:
    """Gradient ascent: λ ← max(0, λ + η e), and with restarts λ ← 0 as soon as e < 0.

    A satisfied constraint has 0 as its best multiplier; without the restart, ascent remembers
    early violation and pushes far into the feasible side.

    Attributes:
        step: η.
        restart: Whether a strictly satisfied constraint resets λ.

    Source: Gallego-Posada et al., NeurIPS 2022, section 4.
    """

    step: float
    restart: bool = True

    def update(
        self, multiplier: float, violation: float, memory: float | None
    ) -> tuple[float, float]:
        if self.restart and violation < 0:
            return 0.0, violation
        return max(0.0, multiplier + self.step * violation), violation


@dataclass(frozen=True)
class NuPI:
    """νPI, a proportional-integral controller on the violation.

        ξ_t = ν ξ_{t-1} + (1 - ν) e_t,    ξ_{-1} = 0
        λ ← max(0, λ + η (K_i e_t + K_p (ξ_t - ξ_{t-1})))

    λ falls while the violation is still shrinking, which damps the overshoot, and follows a change
    of the violation at once. K_p = 0 is plain ascent.

    Attributes:
        step: η.
        proportional: K_p.
        integral: K_i.
        smoothing: ν, in [0, 1).
        signed: Whether the constraint is an equality, whose multiplier may be negative.

    Source: Sohrabi et al., "On PI Controllers for Updating Lagrange Multipliers in Constrained
    Optimization", ICML 2024.
    """

    step: float
    proportional: float
    integral: float = 1.0
    smoothing: float = 0.0
    signed: bool = False

    def update(
        self, multiplier: float, violation: float, memory: float | None
    ) -> tuple[float, float]:
        before = 0.0 if memory is None else memory
        smoothed = self.smoothing * before + (1.0 - self.smoothing) * violation
        change = self.integral * violation + self.proportional * (smoothed - before)
        moved = multiplier + self.step * change
        return moved if self.signed else max(0.0, moved), smoothed


@dataclass(frozen=True)
class Multiplicative:
    """Steps of ln λ along a moving average of the violation, for constraints of unknown scale.

        ē_t = ρ ē_{t-1} + (1 - ρ) e_t,    ē_0 = e_0
        λ ← clip(λ exp(η clip(ē_t, -1, 1)), λ_min, λ_max)    with η_fall for η where ē_t < 0

    λ stays positive, and e is best relative to the constraint's level, so that η has no unit. The
    bounds keep λ from winding up while the constraint cannot be met yet, and from winding down
    where it is met from the start.

    Attributes:
        rise: η.
        fall: η_fall.
        maximum: λ_max.
        minimum: λ_min.
        smoothing: ρ, in [0, 1).

    Source: Rezende, Viola, "Taming VAEs" (GECO), 2018; the published rule λ ← α exp(e) λ drifts
    where α ≠ 1 and e = 0.
    """

    rise: float
    fall: float
    maximum: float = math.inf
    minimum: float = 0.0
    smoothing: float = 0.99

    def update(
        self, multiplier: float, violation: float, memory: float | None
    ) -> tuple[float, float]:
        before = violation if memory is None else memory
        smoothed = self.smoothing * before + (1.0 - self.smoothing) * violation
        step = self.rise if smoothed > 0 else self.fall
        moved = multiplier * math.exp(step * min(1.0, max(-1.0, smoothed)))
        return max(self.minimum, min(self.maximum, moved)), smoothed
