r"""`SoftMask`: the soft mask m that Spartan keeps of a weight, and how w comes from it.

    soft    w = θ · m · h        weights in front of a norm, which does not notice that m is small
    hard    w = θ · h            all others; there m shrinks the signal, layer by layer

Of hard weights m only damps the gradients of what is pruned: with τ, the score of the last unit
that is kept,

    dL/dθ = min(1, m / m(τ)) G

so kept weights learn at full rate, and pruned ones the less the further they are from being kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spartan import kernels
from spartan.kernels import Cutoff, Dual
from spartan.methods.masking.contract import scale_gradients
from spartan.methods.masking.groups import Competition
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.methods.masking.norm_follows import GRADIENTS, MOST, agreement
from spartan.methods.masking.state import WeightState
from spartan.methods.masking.writing import write_kept, write_scaled


@dataclass
class SoftMask(WeightState):
    """What Spartan keeps of a weight.

    Attributes:
        soft: m of each unit where it is stored, of hard weights min(1, m / m(τ)); None while
            `MaskedWeight.dual` stands for it. Stored are masks of units of several weights, those
            of N:M patterns, and, once masks are fixed, m · h of soft weights.
        hard: Whether w = θ · h: until gradients say that a norm follows.
        gradients: How many gradients have been looked at.
        agreement: The sum of what was found in them.
    """

    soft: Tensor | None = None
    hard: bool = True
    gradients: int = 0
    agreement: float = 0.0


def stored(weight: MaskedWeight) -> Tensor | None:
    """Return the stored soft mask, if it is stored."""
    return weight.state_as(SoftMask).soft


def of(weight: MaskedWeight) -> Tensor:
    """Return the soft mask of each unit, at the latent weights it was solved for."""
    if weight.dual is not None:
        return weight.dual.mask(weight.scores())
    mask = stored(weight)
    assert mask is not None
    return mask


def store(competition: Competition, cutoff: Cutoff, dual: Dual) -> None:
    """Store the soft masks of units of several weights; others follow from the dual variable."""
    if all(weight.elementwise for weight in competition.weights):
        return
    for i, (weight, scores) in enumerate(
        zip(competition.weights, competition.unit_scores(), strict=True)
    ):
        state = weight.state_as(SoftMask)
        centred = dual.centred(cutoff.of(i)[0])
        state.soft = centred.damping(scores) if state.hard else centred.mask(scores)


def fix(weight: MaskedWeight) -> None:
    """Store m · h, which from now on stays what it is; of hard weights there is only h."""
    weight.apply_pending()
    state = weight.state_as(SoftMask)
    state.soft = None if state.hard else torch.where(weight.mask, of(weight), 0.0)
    weight.dual = None


def store_rows(weight: MaskedWeight, m: Tensor) -> None:
    """Store the soft masks of an N:M pattern."""
    state = weight.state_as(SoftMask)
    if state.hard:
        last = torch.where(weight.mask, m, 1.0).amin(1, keepdim=True)
        m = torch.where(weight.mask, 1.0, (m / last).nan_to_num_().clamp_(max=1))
    state.soft = m


def write(weights: Sequence[MaskedWeight]) -> None:
    """Write w into the parameters."""
    write_kept([weight for weight in weights if weight.state_as(SoftMask).hard], soft=False)
    soft = [weight for weight in weights if not weight.state_as(SoftMask).hard]
    write_kept([weight for weight in soft if stored(weight) is None])
    kept = [weight for weight in soft if stored(weight) is not None]
    for weight in kept:
        if not weight.elementwise:
            write_scaled(weight, torch.where(weight.mask, of(weight), 0.0))
    fixed = [weight for weight in kept if weight.elementwise]
    if fixed:
        write_kept(fixed)
        parameters = [weight.parameter for weight in fixed]
        torch._foreach_mul_(parameters, [of(weight) for weight in fixed])


def damp_gradients(weights: Sequence[MaskedWeight]) -> None:
    """Damp the gradients of what is pruned of hard weights, in place."""
    solved = [(weight, weight.dual) for weight in weights if weight.dual is not None]
    if solved:
        kernels.damp(
            [weight.required_grad for weight, _ in solved],
            [weight.latent for weight, _ in solved],
            [weight.scale for weight, _ in solved],
            [dual for _, dual in solved],
        )
    others = [weight for weight in weights if weight.dual is None]
    scale_gradients(others, [of(weight) for weight in others])


def look_for_norms(weights: Sequence[MaskedWeight]) -> None:
    """Look at the gradients of w, until enough have been seen to say whether a norm follows."""
    for weight in weights:
        state = weight.state_as(SoftMask)
        if state.gradients < GRADIENTS and (found := agreement(weight)) is not None:
            state.gradients += 1
            state.agreement += found


def decide(weights: Sequence[MaskedWeight]) -> None:
    """Let weights be soft of which enough gradients say that a norm follows.

    Only while masks are selected, after a step that has succeeded: all of a step, and one that is
    taken back, goes by one rule.
    """
    for weight in weights:
        state = weight.state_as(SoftMask)
        if state.hard and state.gradients == GRADIENTS:
            state.hard = state.agreement > MOST * GRADIENTS
