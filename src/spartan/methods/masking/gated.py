r"""`Gated`: base of the L0 methods, with one hard-concrete gate for each pruning unit.

Each unit j has a hard-concrete gate z_j (see `spartan.gates`) and computes with

    w = θ · z,    z drawn once a step for all training passes; the median of z elsewhere,
                  and, in training passes, of the gates that are not drawn in this step.

The expected density of weights with gates is a closed form, without noise:

    g(log α) = sum_j c_j P(z_j ≠ 0) / sum_j c_j,    c_j the cost of unit j

The loss reaches θ and log α through z, and the method pulls at log α with a multiplier λ:

    dL/dθ = G · z,    dL/d log α_j = (sum over unit j of G · θ) · dz_j/d log α_j + λ dg/d log α_j

Gates take their steps with Adam, on gradients multiplied by the number of gates: neither the size
of the model nor the scale of the loss changes the way a gate has to go or the steps it takes.
At the end the units of largest P(z ≠ 0) that fit the budget are kept, and their gates are fixed at
the median (given that the gate is open, where the median is 0).
"""

from __future__ import annotations

import math
import re
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.adam import adam

from spartan import gates
from spartan.budgets.group_budget import RowBudget
from spartan.errors import MethodError, PatternError
from spartan.kernels import Scores, masks_of
from spartan.kernels.memory import flat_view
from spartan.kernels.readback import read_back
from spartan.kernels.scores import wide
from spartan.methods.masking.contract import MaskingMethod, scale_gradients
from spartan.methods.masking.gate_warnings import (
    refuse_too_little,
    warn_idle,
    warn_missed,
    warn_without_effect,
)
from spartan.methods.masking.gates_state import GateGroup, Gates, Sample, gates_of
from spartan.methods.masking.groups import BudgetGroup, Competition, require_finite
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.methods.masking.state import GroupState, WeightState
from spartan.methods.masking.writing import write_scaled
from spartan.schedules import check_fraction
from spartan.seeds import derive_seed
from spartan.selection.hard import find_cutoff

# log α starts here, give or take a hundredth: nearly all gates open, as published for large nets.
_START, _SPREAD = math.log(0.95 / 0.05), 0.01
# Gates stay where they can still move. P(open) at most: the published clamp log α <= ln 100, beyond
# which the gradient, of the order of P (1 - P), is too small to come back. P(open) at least: this
# fraction of the target density, and never more than 0.05; a fixed floor (the published one is
# 0.047) would put targets below it out of reach.
_CEILING, _FLOOR_SHARE = 0.998, 0.1
# Of Adam. A longer memory of the first moment would carry gates past the target; that of the second
# is 100 steps, in which the scale of gradients changes as gates close.
_BETAS = (0.5, 0.99)
# How fast the unit of λ follows the gradient of the loss: 50 steps outlast the noise of batches.
_FOLLOW = 0.02
# Step at which it is checked whether the loss depends on the gates: every layer has had a gradient,
# and little time is lost.
_CHECKED_STEP = 5


@dataclass(frozen=True)
class Gated(MaskingMethod):
    """Base of the methods with gates.

    Until the last update, each step draws gates (`write_sample`, at the first training pass of the
    step; further passes see the same), takes their gradient (`pull_back`), and moves log α
    (`select`), which ends the draw. A draw without a gradient stays. At the last update the exact
    selection replaces all gates by fixed ones, and the kept weights train on.

    Attributes:
        gate_lr: How far log α of a gate travels if it goes one way during the whole run. From open
            to closed it is about 8; the rest is room for the loss to disagree.
        finetune: Last fraction of the run: the budget is met, and kept weights train with fixed
            gates.
        keep_one: Whether each layer keeps at least its strongest unit; layers that are given a
            density of 0 do not.
        sampled: Share of the gates that are drawn anew each step, others each time; the rest are at
            their median, and have no say in it.
        seed: Of the gates' draws, the same in every process.

    Raises:
        MethodError: A setting is out of range.
    """

    gate_lr: float = 120.0
    finetune: float = 0.2
    keep_one: bool = True
    sampled: float = 1.0
    seed: int = 0

    constrained: ClassVar[bool] = False  # whether gates are meant to reach the budget by themselves
    weight_state: ClassVar[type[WeightState]] = Gates
    group_state: ClassVar[type[GroupState]] = GateGroup
    step_cost: ClassVar[str] = "a random number per unit, in torch; three floats of state each"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gate_lr) and self.gate_lr > 0):
            raise MethodError(
                f"gate_lr={self.gate_lr} must be positive: gates that do not move reach no density."
            )
        check_fraction("finetune", self.finetune)
        if not 0 < self.sampled <= 1:
            raise MethodError(f"sampled={self.sampled!r} must lie in (0, 1].")
        if self.finetune == 1.0:
            raise MethodError("finetune=1 leaves no step in which gates could be trained.")

    def to_latent(self, weight: MaskedWeight, w: Tensor) -> Tensor:
        if gates_of(weight).log_alpha is None and gates_of(weight).fixed is None:
            return w
        gate = weight.spread(_shown_gate(weight))
        return torch.where(gate > 0, wide(w) / gate, wide(w)).to(w.dtype)

    @abstractmethod
    def multiplier(self, group: BudgetGroup, step: int, total_steps: int) -> float:
        """Return λ, in units of the loss, for the step that was just done."""

    def moves_masks(self, step: int, total_steps: int) -> bool:
        return step <= self._last_update(total_steps)

    def progress(self, step: int, total_steps: int) -> float:
        return float(step >= self._last_update(total_steps))

    def samples(self, step: int, total_steps: int) -> bool:
        return step < self._last_update(total_steps)

    # θ, z and w ---------------------------------------------------------------------------------

    def write_sample(self, weights: Sequence[MaskedWeight], step: int) -> None:
        for weight in weights:
            own = gates_of(weight)
            if own.sample is None:
                generator = torch.Generator(weight.latent.device)
                generator.manual_seed(derive_seed(self.seed, _own_name(weight), step))
                own.sample = self._draw(own.log_alphas, generator)
            write_scaled(weight, own.sample.gate)
            weight.sampled = True

    def _draw(self, log_alpha: Tensor, generator: torch.Generator) -> Sample:
        """Draw the share of the gates that is drawn in a step; its slopes stand for all."""
        gate, slope = gates.draw(log_alpha, generator)
        if self.sampled == 1.0:
            return Sample(gate, slope)
        chosen = torch.rand(gate.shape, device=gate.device, generator=generator) < self.sampled
        resting = torch.where(chosen, gate, gates.median(log_alpha))
        return Sample(resting, torch.where(chosen, slope / self.sampled, 0.0))

    def write(self, weights: Sequence[MaskedWeight]) -> None:
        for weight in weights:
            write_scaled(weight, _resting_gate(weight))

    def materialize(self, weight: MaskedWeight) -> Tensor:
        gate = weight.spread(_shown_gate(weight))
        return (wide(weight.theta) * gate).add_(0.0).to(weight.latent.dtype)

    def pull_back(
        self, group: BudgetGroup, weights: Sequence[MaskedWeight], step: int, total_steps: int
    ) -> None:
        if step >= self._last_update(total_steps):
            scale_gradients(weights, [_resting_gate(weight) for weight in weights])
            return
        samples = [sample for w in weights if (sample := gates_of(w).sample) is not None]
        if len(samples) < len(weights):
            raise MethodError(
                f"No gates were drawn for step {step + 1}: {self.name!r} draws them when the model "
                "that the sparsifier was made with is called in training mode. Call that model "
                "after model.train(), after loading a state, and compile it after making the "
                "sparsifier; before calling only parts of it call begin_pass(training=True)."
            )
        if step >= _CHECKED_STEP and not group.state_as(GateGroup).heard:
            group.state_as(GateGroup).heard = True
            warn_without_effect(weights)
        for weight, sample in zip(weights, samples, strict=True):
            pulled = weight.pool_product(weight.required_grad)
            gates_of(weight).pulled = pulled.mul_(sample.slope).div_(weight.loss_scale)
        scale_gradients(weights, [sample.gate for sample in samples])

    def is_soft(self, weight: MaskedWeight) -> bool:
        return True

    def lacks(self, weight: MaskedWeight, step: int, total_steps: int) -> str | None:
        own = gates_of(weight)
        if step >= self._last_update(total_steps):
            return "fixed gates" if own.fixed is None else None
        moments = (own.log_alpha, own.mean, own.square)
        return "gates" if any(tensor is None for tensor in moments) else None

    # Gates --------------------------------------------------------------------------------------

    def select(self, groups: Sequence[BudgetGroup], step: int, total_steps: int) -> None:
        if step >= self._last_update(total_steps):
            for group in groups:
                self._fix(group)
            return
        if step == 0:
            for group in groups:
                self._start(group)
        else:
            require_finite([weight for group in groups for weight in group.weights])
            self._step_gates(groups, step, total_steps)
        for weight in (weight for group in groups for weight in group.weights):
            own = gates_of(weight)
            weight.mask = own.log_alphas > -gates.KAPPA
            if own.pulled is not None:  # else the sample may be for another optimizer
                own.sample = own.pulled = None

    def _start(self, group: BudgetGroup) -> None:
        if isinstance(group.budget, RowBudget):
            raise PatternError(
                f"{self.name!r} trains gates against the expected density of whole layers; an N:M "
                "pattern fixes it for every few weights. Use 'spartan' or 'dpf' for N:M, or choose "
                "unstructured, block or channel."
            )
        if self.keep_one:
            refuse_too_little(group)
        for weight in group.weights:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, _own_name(weight), -1))
            start = torch.randn(weight.stored_mask.shape, generator=generator) * _SPREAD + _START
            own, dtype = gates_of(weight), wide(weight.latent[:0]).dtype
            own.log_alpha, own.mean, own.square = (
                torch.zeros_like(weight.stored_mask, dtype=dtype) for _ in range(3)
            )
            own.log_alpha.copy_(start)
        state = group.state_as(GateGroup)
        state.expected = state.start = float(expected_cost(group)) / group.budget.total

    def _step_gates(self, groups: Sequence[BudgetGroup], step: int, total_steps: int) -> None:
        rows = [
            torch.stack((expected_cost(g), _pull_of_loss(g), _weakest_layer(g))) for g in groups
        ]
        if step == _CHECKED_STEP:
            warn_idle(groups)
        for group, (cost, pull, weakest) in zip(groups, read_back(rows), strict=True):
            if weakest <= (0.0 if self.keep_one else -gates.KAPPA):
                self._warn_shut(group)
            state = group.state_as(GateGroup)
            state.expected = cost / group.budget.total
            unit = pull if state.unit is None else state.unit
            state.unit = unit + _FOLLOW * (pull - unit)
            state.multiplier = self.multiplier(group, step, total_steps)
            self._step_group(group, state.multiplier, step, total_steps)

    def _step_group(
        self, group: BudgetGroup, multiplier: float, step: int, total_steps: int
    ) -> None:
        weights = group.weights
        units = sum(weight.units for weight in weights)
        pulls = [self._pull(group, weight, multiplier) for weight in weights]
        torch._foreach_mul_(pulls, float(units))
        owns = [gates_of(weight) for weight in weights]
        log_alphas = [own.log_alphas for own in owns]
        adam(
            log_alphas,
            pulls,
            [own.mean for own in owns if own.mean is not None],
            [own.square for own in owns if own.square is not None],
            [],
            [torch.tensor(float(step - 1)) for _ in weights],
            foreach=True,
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=self.gate_lr / total_steps,
            weight_decay=0.0,
            eps=1e-12,
            maximize=False,
        )
        low = gates.log_alpha_at(min(_FLOOR_SHARE * target_density(group), 0.05))
        for log_alpha in log_alphas:
            log_alpha.clamp_(low, gates.log_alpha_at(_CEILING))
            if self.keep_one:
                # The strongest gate of a layer is held half open.
                entries = flat_view(log_alpha)
                strongest = entries.argmax()
                entries[strongest] = entries[strongest].clamp_min(0.0)

    def _pull(self, group: BudgetGroup, weight: MaskedWeight, multiplier: float) -> Tensor:
        """Return the gradient of a weight's log α."""
        pull = density_gradient(group, weight).mul_(multiplier)
        pulled = gates_of(weight).pulled
        if pulled is not None:
            return pull.add_(pulled)
        # A weight without a gradient has no say: its gates close as far as the average has to.
        p = gates.open_probability(gates_of(weight).log_alphas).mean()
        return pull.mul_((p > target_density(group)).to(pull.dtype))

    def _warn_shut(self, group: BudgetGroup) -> None:
        """Say once of each layer that it would be shut."""
        bound = 0.0 if self.keep_one else -gates.KAPPA
        new = []
        for weight in group.weights:
            own = gates_of(weight)
            if not own.shut and float(own.log_alphas.max()) <= bound:
                own.shut = True
                new.append(weight.name)
        if new:
            does = "its strongest is held open" if self.keep_one else "it passes nothing on"
            warnings.warn(
                f"All gates of {', '.join(map(repr, new))} close, so that {does}: the budget "
                "leaves the layer nothing. Raise the density, exclude it, or allocate per layer.",
                stacklevel=2,
            )

    def _fix(self, group: BudgetGroup) -> None:
        """Keep what fits the budget, and fix the gates."""
        state = group.state_as(GateGroup)
        state.expected = float(expected_cost(group)) / group.budget.total
        state.open = group.kept / group.budget.total
        if self.constrained:
            warn_missed(group)
        competition = group.competition(1.0)
        masks = self._most_open(competition)
        for weight, mask in zip(competition.weights, masks, strict=True):
            log_alpha = gates_of(weight).log_alphas
            gate = gates.median(log_alpha)
            gate = torch.where(gate > 0, gate, gates.open_median(log_alpha))
            weight.state = Gates(fixed=torch.where(mask, gate, 0.0), shut=gates_of(weight).shut)
            weight.mask = mask

    def _most_open(self, competition: Competition) -> list[Tensor]:
        """Return masks of the units most probably open that fit the budget."""
        ranks = [gates_of(weight).log_alphas for weight in competition.weights]
        costs = [weight.cost for weight in competition.weights]
        floors: Sequence[int] = ()
        if self.keep_one:
            one_each = [1] * len(ranks) if sum(costs) <= competition.budget else ()
            floors = competition.floors or one_each
        scores = Scores(ranks, [1.0] * len(ranks), costs, absolute=False)
        return masks_of(scores, find_cutoff(scores, competition.budget, floors))

    def monitor(self, group: BudgetGroup) -> dict[str, float]:
        """Return what the gates alone reach: expected density, and density of those mostly open."""
        state = group.state_as(GateGroup)
        numbers = {"expected": state.expected, "open": state.open, "multiplier": state.multiplier}
        return {name: number for name, number in numbers.items() if number is not None}

    def _last_update(self, total_steps: int) -> int:
        return total_steps - int(self.finetune * total_steps)


def target_density(group: BudgetGroup) -> float:
    """Return the density of the budget; for one that keeps nothing, of half a unit."""
    smallest = 0.5 * min(weight.cost for weight in group.weights)
    return max(group.budget.kept, smallest) / group.budget.total


def expected_cost(group: BudgetGroup) -> Tensor:
    """Return the expected cost of the open gates, in the currency of the budget."""
    costs = [
        gates.open_probability(gates_of(weight).log_alphas).sum(dtype=torch.float64) * weight.cost
        for weight in group.weights
    ]
    return torch.stack(costs).sum()


def density_gradient(group: BudgetGroup, weight: MaskedWeight) -> Tensor:
    """Return dg / d log α of a weight's gates: c P (1 - P) / sum of c."""
    p = gates.open_probability(gates_of(weight).log_alphas)
    return (p * (1 - p)).mul_(weight.cost / group.budget.total)


def _pull_of_loss(group: BudgetGroup) -> Tensor:
    """Return the root mean square of the loss's pull at a gate, times the number of gates."""
    pulled = [pull for weight in group.weights if (pull := gates_of(weight).pulled) is not None]
    if not pulled:
        return torch.zeros((), dtype=torch.float64, device=group.weights[0].latent.device)
    squares = torch.stack([x.square().sum(dtype=torch.float64) for x in pulled]).sum()
    count = sum(x.numel() for x in pulled)
    units = sum(weight.units for weight in group.weights)
    return (squares / count).sqrt() * units


def _weakest_layer(group: BudgetGroup) -> Tensor:
    """Return the smallest, over layers, of the largest log α."""
    return (
        torch.stack([gates_of(weight).log_alphas.amax() for weight in group.weights])
        .amin()
        .double()
    )


def _own_name(weight: MaskedWeight) -> str:
    """Return the name of the weight in the model itself: wrappers do not change what is drawn."""
    return re.sub(r"(^|\.)(module|_orig_mod)\.", r"\1", weight.name)


def _shown_gate(weight: MaskedWeight) -> Tensor:
    """Return the gates that the parameter was written with."""
    sample = gates_of(weight).sample
    return sample.gate if weight.sampled and sample is not None else _resting_gate(weight)


def _resting_gate(weight: MaskedWeight) -> Tensor:
    """Return the gates of every pass but a training pass: the medians, or the fixed ones."""
    own = gates_of(weight)
    return gates.median(own.log_alphas) if own.fixed is None else own.fixed
