"""Computes w = θ · mask into parameters, for many masked weights in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from torch import Tensor

from spartan import kernels
from spartan.kernels import units
from spartan.kernels.scores import wide
from spartan.methods.masking.masked_weight import MaskedWeight


def write_kept(weights: Sequence[MaskedWeight], soft: bool = True) -> None:
    """Write w = θ where the mask keeps it.

    Args:
        weights: The weights.
        soft: Whether those with a dual variable get θ · m instead.
    """
    for alike in _alike([weight for weight in weights if weight.elementwise]):
        write_masked(alike, soft=soft)
        for weight in alike:
            weight.stepping = False
            if weight.pending is not None:
                weight.note_applied(weight.pending.dual)
    for weight in weights:
        if not weight.elementwise:
            write_scaled(weight, weight.mask)


def write_scaled(weight: MaskedWeight, factors: Tensor) -> None:
    """Write w = θ times a factor for each unit, a number or a boolean."""
    latent = weight.latent if weight.stepping else None
    factors = factors.to(wide(weight.latent[:0]).dtype)
    units.scale(weight.theta, factors, latent, weight.parameter, weight.grid)
    weight.stepping = weight.sampled = False


def write_given(
    weights: Sequence[MaskedWeight], materialize: Callable[[MaskedWeight], Tensor]
) -> None:
    """Write what `materialize` returns, weight by weight."""
    for weight in weights:
        w = materialize(weight)
        if weight.stepping:
            weight.latent.copy_(weight.theta)
        weight.prunable.parameter.copy_(w)
        weight.stepping = False


def write_masked(
    weights: Sequence[MaskedWeight], into: Sequence[Tensor] | None = None, soft: bool = True
) -> None:
    """Write the weights of elementwise weights that are alike in what they have.

    Args:
        weights: All with a pending mask or all without, all with a soft mask or all without, all
            inside a step or all outside.
        into: Tensors to write to instead of the parameters, of weights without a pending mask. θ
            then stays where it is.
        soft: Whether soft masks are multiplied in.
    """
    pending = [weight.pending for weight in weights if weight.pending is not None]
    duals = [p.dual for p in pending] if pending else [weight.dual for weight in weights]
    used = [dual for dual in duals if dual is not None and soft]
    stepping = weights[0].stepping and into is None
    kernels.project(
        [weight.theta for weight in weights],
        [weight.latent for weight in weights] if stepping else [],
        [weight.parameter for weight in weights] if into is None else into,
        [weight.stored_mask for weight in weights],
        [weight.scale for weight in weights],
        [(p.threshold, p.tie_end) for p in pending] or None,
        used or None,
    )


def _alike(weights: Sequence[MaskedWeight]) -> Iterator[list[MaskedWeight]]:
    def kind(weight: MaskedWeight) -> tuple[bool, bool, bool]:
        dual = weight.pending.dual if weight.pending else weight.dual
        return weight.stepping, weight.pending is not None, dual is not None

    for _, run in groupby(sorted(weights, key=kind), key=kind):
        yield list(run)
