r"""Gates on units: what the penalised and the constrained L0 methods share.

Each unit j has a hard-concrete gate z_j (see `spartan.gates`) and computes with

    w = θ · z,    z drawn once a step for all training passes; the median of z elsewhere.

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
from spartan.errors import MethodError, PatternError
from spartan.kernels import Scores, masks_of
from spartan.kernels.memory import flat
from spartan.kernels.readback import read_back
from spartan.kernels.scores import wide
from spartan.methods.base import Method, scale_gradients
from spartan.methods.gate_checks import (
    refuse_too_little,
    warn_idle,
    warn_missed,
    warn_unheard,
)
from spartan.methods.groups import Contest, Group, require_finite
from spartan.methods.sites import Site
from spartan.methods.writing import write_scaled
from spartan.schedules import check_fraction
from spartan.seeds import derive_seed
from spartan.selection.hard import find_cut

# log α starts here, give or take a hundredth: nearly all gates open, as published for large nets.
_START, _SPREAD = math.log(0.95 / 0.05), 0.01
# Gates stay where they can still move: open with at most this probability, closed with at least
# this share of the target density.
_CEILING, _FLOOR_SHARE = 0.998, 0.1
# A longer memory of the first moment would carry gates past the target.
_BETAS = (0.5, 0.99)
_FOLLOW = 0.02  # how fast the unit of λ follows the pull of the loss
_LAST = -1e3  # ranks behind every log α
_CHECKED_STEP = 5  # at which gates are checked for whether the loss hears them


@dataclass(frozen=True)
class Gated(Method):
    """Base of the methods with gates.

    Attributes:
        gate_lr: How far log α of a gate travels if it goes one way during the whole run. From open
            to closed it is about 8; the rest is room for the loss to disagree.
        finetune: Last fraction of the run: the budget is met, and kept weights train with fixed
            gates.
        keep_one: Whether each layer keeps at least its strongest unit; layers that are given a
            density of 0 do not.
        seed: Of the gates' draws, the same in every process.

    Raises:
        MethodError: A setting is out of range.
    """

    gate_lr: float = 120.0
    finetune: float = 0.2
    keep_one: bool = True
    seed: int = 0

    constrained: ClassVar[bool] = False  # whether gates are meant to reach the budget by themselves
    step_cost: ClassVar[str] = "a random number per unit, in torch; three floats of state each"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gate_lr) and self.gate_lr > 0):
            raise MethodError(
                f"gate_lr={self.gate_lr} must be positive: gates that do not move reach no density."
            )
        check_fraction("finetune", self.finetune)
        if self.finetune == 1.0:
            raise MethodError("finetune=1 leaves no step in which gates could be trained.")

    def to_latent(self, site: Site, weight: Tensor) -> Tensor:
        if not site.tensors:
            return weight
        gate = site.spread(_shown_gate(site))
        return torch.where(gate > 0, wide(weight) / gate, wide(weight)).to(weight.dtype)

    @abstractmethod
    def multiplier(self, group: Group, step: int, total_steps: int) -> float:
        """Return λ, in units of the loss, for the step that was just done."""

    def moves_masks(self, step: int, total_steps: int) -> bool:
        return step <= self._last_update(total_steps)

    def progress(self, step: int, total_steps: int) -> float:
        return float(step >= self._last_update(total_steps))

    def samples(self, step: int, total_steps: int) -> bool:
        return step < self._last_update(total_steps)

    # θ, z and w ---------------------------------------------------------------------------------

    def write_sample(self, sites: Sequence[Site], step: int) -> None:
        for site in sites:
            if "gate" not in site.scratch:
                generator = torch.Generator(site.latent.device)
                generator.manual_seed(derive_seed(self.seed, _own_name(site), step))
                gate, slope = gates.draw(site.tensors["log_alpha"], generator)
                site.scratch["gate"], site.scratch["slope"] = gate, slope
            write_scaled(site, site.scratch["gate"])
            site.sampled = True

    def write(self, sites: Sequence[Site]) -> None:
        for site in sites:
            write_scaled(site, _resting_gate(site))

    def materialize(self, site: Site) -> Tensor:
        gate = site.spread(_shown_gate(site))
        return (wide(site.theta) * gate).add_(0.0).to(site.latent.dtype)

    def pull_back(self, group: Group, sites: Sequence[Site], step: int, total_steps: int) -> None:
        if step >= self._last_update(total_steps):
            scale_gradients(sites, [site.tensors["gate"] for site in sites])
            return
        if any("gate" not in site.scratch for site in sites):
            raise MethodError(
                f"No gates were drawn for step {step + 1}: {self.name!r} draws them when the model "
                "that the sparsifier was made with is called in training mode. Call that model, "
                "not its parts, after model.train(), after loading a state, and compile it after "
                "making the sparsifier."
            )
        if step >= _CHECKED_STEP and "heard" not in group.numbers:
            group.numbers["heard"] = 1.0
            warn_unheard(sites)
        for site in sites:
            pulled = site.pool_product(site.required_grad)
            site.scratch["pulled"] = pulled.mul_(site.scratch["slope"]).div_(site.loss_scale)
        scale_gradients(sites, [site.scratch["gate"] for site in sites])

    # Gates --------------------------------------------------------------------------------------

    def select(self, groups: Sequence[Group], step: int, total_steps: int) -> None:
        if step >= self._last_update(total_steps):
            for group in groups:
                self._fix(group)
            return
        if step == 0:
            for group in groups:
                self._start(group)
        else:
            require_finite([site for group in groups for site in group.sites])
            self._step_gates(groups, step, total_steps)
        for site in (site for group in groups for site in group.sites):
            site.mask = site.tensors["log_alpha"] > -gates.KAPPA
            if "pulled" in site.scratch:  # else the draw may be for another optimizer
                site.scratch.clear()

    def _start(self, group: Group) -> None:
        if group.share.rows:
            raise PatternError(
                f"{self.name!r} trains gates against the expected density of whole layers; an N:M "
                "pattern fixes it for every few weights. Use 'spartan' or 'dpf' for N:M, or choose "
                "unstructured, block or channel."
            )
        if self.keep_one:
            refuse_too_little(group)
        for site in group.sites:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, _own_name(site), -1))
            start = torch.randn(site.stored_mask.shape, generator=generator) * _SPREAD + _START
            mask = site.stored_mask
            for key in ("log_alpha", "mean", "square"):
                site.tensors[key] = torch.zeros_like(mask, dtype=wide(site.latent[:0]).dtype)
            site.tensors["log_alpha"].copy_(start)
        group.numbers["expected"] = float(expected_cost(group)) / group.share.total
        group.numbers["start"] = group.numbers["expected"]

    def _step_gates(self, groups: Sequence[Group], step: int, total_steps: int) -> None:
        rows = [
            torch.stack((expected_cost(g), _pull_of_loss(g), _weakest_layer(g))) for g in groups
        ]
        if step == _CHECKED_STEP:
            warn_idle(groups)
        for group, (cost, pull, weakest) in zip(groups, read_back(rows), strict=True):
            if weakest <= (0.0 if self.keep_one else -gates.KAPPA):
                self._warn_shut(group)
            group.numbers["expected"] = cost / group.share.total
            unit = group.numbers.get("unit", pull)
            group.numbers["unit"] = unit + _FOLLOW * (pull - unit)
            multiplier = self.multiplier(group, step, total_steps)
            group.numbers["multiplier"] = multiplier
            self._step_group(group, step, total_steps)

    def _step_group(self, group: Group, step: int, total_steps: int) -> None:
        sites = group.sites
        units = sum(site.units for site in sites)
        pulls = [self._pull(group, site) for site in sites]
        torch._foreach_mul_(pulls, float(units))
        log_alphas = [site.tensors["log_alpha"] for site in sites]
        adam(
            log_alphas,
            pulls,
            [site.tensors["mean"] for site in sites],
            [site.tensors["square"] for site in sites],
            [],
            [torch.tensor(float(step - 1)) for _ in sites],
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
                entries = flat(log_alpha)
                strongest = entries.argmax()
                entries[strongest] = entries[strongest].clamp_min(0.0)

    def _pull(self, group: Group, site: Site) -> Tensor:
        """Return the gradient of a site's log α."""
        pull = density_gradient(group, site).mul_(group.numbers["multiplier"])
        if "pulled" in site.scratch:
            return pull.add_(site.scratch["pulled"])
        # A weight without a gradient has no say: its gates close as far as the average has to.
        p = gates.open_probability(site.tensors["log_alpha"]).mean()
        return pull.mul_((p > target_density(group)).to(pull.dtype))

    def _warn_shut(self, group: Group) -> None:
        """Say once of each layer that it would be shut."""
        bound = 0.0 if self.keep_one else -gates.KAPPA
        shut = [s.name for s in group.sites if float(s.tensors["log_alpha"].max()) <= bound]
        new = [name for name in shut if f"shut {name}" not in group.numbers]
        group.numbers.update({f"shut {name}": 1.0 for name in new})
        if new:
            does = "its strongest is held open" if self.keep_one else "it passes nothing on"
            warnings.warn(
                f"All gates of {', '.join(map(repr, new))} close, so that {does}: the budget "
                "leaves the layer nothing. Raise the density, exclude it, or allocate per layer.",
                stacklevel=2,
            )

    def _fix(self, group: Group) -> None:
        """Keep what fits the budget, and fix the gates."""
        group.numbers["expected"] = float(expected_cost(group)) / group.share.total
        group.numbers["open"] = group.kept / group.share.total
        if self.constrained:
            warn_missed(group)
        contest = group.contest(1.0)
        for site, mask in zip(contest.sites, self._most_open(contest), strict=True):
            log_alpha = site.tensors["log_alpha"]
            gate = gates.median(log_alpha)
            gate = torch.where(gate > 0, gate, gates.open_median(log_alpha))
            site.tensors = {"gate": torch.where(mask, gate, 0.0)}
            site.mask = mask
            site.scratch.clear()

    def _most_open(self, contest: Contest) -> list[Tensor]:
        """Return masks of the units most probably open that fit the budget."""
        ranks = [site.tensors["log_alpha"].clone() for site in contest.sites]
        costs = [site.cost for site in contest.sites]
        budget = contest.budget
        held = [torch.zeros_like(rank, dtype=torch.bool) for rank in ranks]
        if self.keep_one and sum(costs) <= budget:
            budget -= sum(costs)
            for rank, hold in zip(ranks, held, strict=True):
                strongest = flat(rank).argmax()
                flat(hold)[strongest] = True
                flat(rank)[strongest] = _LAST
        scores = Scores(ranks, [1.0] * len(ranks), costs, absolute=False)
        masks = masks_of(scores, find_cut(scores, budget))
        return [mask | hold for mask, hold in zip(masks, held, strict=True)]

    def monitor(self, group: Group) -> dict[str, float]:
        """Return what the gates alone reach: expected density, and density of those mostly open."""
        keys = ("expected", "open", "multiplier")
        return {key: group.numbers[key] for key in keys if key in group.numbers}

    def _last_update(self, total_steps: int) -> int:
        return total_steps - int(self.finetune * total_steps)


def target_density(group: Group) -> float:
    """Return the density of the budget; for one that keeps nothing, of half a unit."""
    smallest = 0.5 * min(site.cost for site in group.sites)
    return max(group.share.kept, smallest) / group.share.total


def expected_cost(group: Group) -> Tensor:
    """Return the expected cost of the open gates, in the currency of the budget."""
    costs = [
        gates.open_probability(site.tensors["log_alpha"]).sum(dtype=torch.float64) * site.cost
        for site in group.sites
    ]
    return torch.stack(costs).sum()


def density_gradient(group: Group, site: Site) -> Tensor:
    """Return dg / d log α of a site's gates: c P (1 - P) / sum of c."""
    p = gates.open_probability(site.tensors["log_alpha"])
    return (p * (1 - p)).mul_(site.cost / group.share.total)


def _pull_of_loss(group: Group) -> Tensor:
    """Return the root mean square of the loss's pull at a gate, times the number of gates."""
    pulled = [site.scratch["pulled"] for site in group.sites if "pulled" in site.scratch]
    if not pulled:
        return torch.zeros((), dtype=torch.float64, device=group.sites[0].latent.device)
    squares = torch.stack([x.square().sum(dtype=torch.float64) for x in pulled]).sum()
    count = sum(x.numel() for x in pulled)
    units = sum(site.units for site in group.sites)
    return (squares / count).sqrt() * units


def _weakest_layer(group: Group) -> Tensor:
    """Return the smallest, over layers, of the largest log α."""
    return torch.stack([site.tensors["log_alpha"].amax() for site in group.sites]).amin().double()


def _own_name(site: Site) -> str:
    """Return the name of the weight in the model itself: wrappers do not change what is drawn."""
    return re.sub(r"(^|\.)(module|_orig_mod)\.", r"\1", site.name)


def _shown_gate(site: Site) -> Tensor:
    """Return the gates that the parameter was written with."""
    return site.scratch["gate"] if site.sampled else _resting_gate(site)


def _resting_gate(site: Site) -> Tensor:
    if "gate" in site.tensors:
        return site.tensors["gate"]
    return gates.median(site.tensors["log_alpha"])
