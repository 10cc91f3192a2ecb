r"""Constrained L0 (Gallego-Posada et al., NeurIPS 2022): density as a constraint, not a penalty.

    minimise over θ, log α   L(θ, log α)   subject to   g(log α) <= ε

with gates on units, g their expected density and ε the budget (see `gated`): one constraint for
each group of weights that shares a budget, so one for the model, or one for each layer, in
parameters, FLOPs or bytes. The Lagrangian

    L + λ (g - ε)

is descended on in θ and log α, and ascended on in λ, simultaneously. Five things differ from the
published algorithm, so that nothing has to be tuned:

* λ is counted in units of the loss's own pull at the gates, a running mean of its root mean square.
  What a step of λ means then depends neither on the number of gates nor on the scale of the loss.
* λ follows e = ln(g / ε), which is about (g - ε) / ε near the target: small densities are as
  visible as large ones. Its sign is that of g - ε.
* ε begins at the density of the first step, and over the warm-up goes along the curve of gates that
  all close at one speed. Gates that are closed in haste close alike, whatever the loss says.
  `warmup=0` is the published constant.
* By default λ is moved by νPI, and the constraint is g = ε with a λ of either sign: gates that
  close by the noise of training are opened again, and the budget is used. `dual="restart"` is the
  published ascent for g <= ε; it lets go as soon as the target is crossed.
* A quarter of the gates is drawn anew each step (`sampled`), another one each time; the rest are at
  their median. θ sees less noise; slopes are divided by the share, so that pulls keep their size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from spartan.errors import MethodError, did_you_mean
from spartan.methods.masking.gated import Gated, target_density
from spartan.methods.masking.gates_state import GateGroup
from spartan.methods.masking.groups import BudgetGroup
from spartan.multipliers import Ascent, DualRule, NuPI
from spartan.schedules import check_fraction, check_order, interpolate, progress

_RULES = ("nupi", "restart", "ascent")


@dataclass(frozen=True)
class ConstrainedL0(Gated):
    """Hard-concrete gates whose expected density is held at the budget by a multiplier.

    Attributes:
        dual: How λ moves: `"nupi"` (a PI controller), `"restart"` (gradient ascent that restarts at
            0 where the constraint holds, as published), `"ascent"` (without restarts).
        dual_lr: What a violation of 1 that lasts for the whole run adds to λ.
        proportional: For `"nupi"`, what it adds at once.
        warmup: Fraction of the run over which the target tightens.
        sampled, gate_lr, finetune, keep_one, seed: See `Gated`; 1 is published.

    Raises:
        MethodError: A setting is out of range.

    Source: Gallego-Posada, Ramirez, Erraqabi, Bengio, Lacoste-Julien, "Controlled Sparsity via
    Constrained Optimization or: How I Learned to Stop Tuning Penalties and Love Constraints",
    NeurIPS 2022.
    """

    dual: Literal["nupi", "restart", "ascent"] = "nupi"
    dual_lr: float = 60.0
    proportional: float = 200.0
    warmup: float = 0.6
    # Of 0.1, 0.25 and 1 the best for the league's convolutions without norms: with all drawn, θ
    # loses more to the noise than the gates gain.
    sampled: float = 0.25

    constrained: ClassVar[bool] = True
    name: ClassVar[str] = "constrained-l0"
    summary: ClassVar[str] = "learned gates and a constraint; learns how layers share a budget"
    paper: ClassVar[str] = "Gallego-Posada et al., NeurIPS 2022"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual not in _RULES:
            raise MethodError(f"dual={self.dual!r}; {did_you_mean(self.dual, _RULES)}")
        if not (math.isfinite(self.dual_lr) and self.dual_lr > 0):
            raise MethodError(f"dual_lr={self.dual_lr} must be positive.")
        if not (math.isfinite(self.proportional) and self.proportional >= 0):
            raise MethodError(f"proportional={self.proportional} must be 0 or more.")
        check_fraction("warmup", self.warmup)
        check_order(self.warmup, self.finetune)

    def multiplier(self, group: BudgetGroup, step: int, total_steps: int) -> float:
        state = group.state_as(GateGroup)
        assert state.expected is not None
        assert state.unit is not None
        violation = math.log(state.expected / self._target(group, step, total_steps))
        now = state.dual
        state.dual, state.memory = self._rule(total_steps).update(now, violation, state.memory)
        return now * state.unit

    def _target(self, group: BudgetGroup, step: int, total_steps: int) -> float:
        density = target_density(group)
        tight = progress(step, int(self.warmup * total_steps))
        start = group.state_as(GateGroup).start
        assert start is not None
        if density >= start:
            return density
        # The way of gates that all move at one speed.
        odds = interpolate(math.log(start / (1 - start)), math.log(density / (1 - density)), tight)
        return 1 / (1 + math.exp(-odds))

    def _rule(self, total_steps: int) -> DualRule:
        step = self.dual_lr / total_steps
        if self.dual == "nupi":
            return NuPI(step, self.proportional / step, signed=True)
        return Ascent(step, restart=self.dual == "restart")
