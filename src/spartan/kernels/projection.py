"""Writes masked weights: latent copy, mask and parameter in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spartan.kernels.dispatch import native_for
from spartan.kernels.memory import alike, flat, unflat
from spartan.kernels.scores import flat_pieces, wide
from spartan.kernels.selection import kept
from spartan.kernels.soft import Dual


def project(
    thetas: Sequence[Tensor],
    latents: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    scales: Sequence[float],
    cutoffs: Sequence[tuple[float, int]] | None,
    duals: Sequence[Dual] | None,
) -> None:
    """Write w = θ, or θ · m, where the mask keeps it and exact zeros elsewhere, in one pass.

    Args:
        thetas: θ of each tensor; may be the tensors of `weights`.
        latents: Where θ is copied to; empty for no copy.
        weights: Where w is written to.
        masks: Boolean, written if there are cutoffs, else read.
        scales: Scores are u = scale · |θ|.
        cutoffs: Threshold and tie_end of each tensor (see `Cutoff`), or None to use the masks.
        duals: Dual variable of each tensor's soft mask m, or None for m = 1.
    """
    native = native_for(thetas, latents, weights)
    if native is None or not _fit(masks, thetas):
        _project(thetas, latents, weights, masks, scales, cutoffs, duals)
        return
    native.project(
        thetas=thetas,
        latents=latents,
        weights=weights,
        masks=masks,
        scales=scales,
        thresholds=None if cutoffs is None else [threshold for threshold, _ in cutoffs],
        tie_ends=None if cutoffs is None else [tie_end for _, tie_end in cutoffs],
        duals=None if duals is None else [dual.astuple() for dual in duals],
        threads=torch.get_num_threads(),
    )
    for weight in weights:
        torch.autograd.graph.increment_version(weight)


def mask_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Write exact zeros where a boolean mask is False, in place."""
    native = native_for(tensors)
    if native is None or not _fit(masks, tensors):
        for tensor, mask in zip(tensors, masks, strict=True):
            for x, keep in flat_pieces(tensor, mask):
                x.masked_fill_(~keep, 0.0)
        return
    native.mask(tensors=tensors, masks=masks, threads=torch.get_num_threads())
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


def _fit(masks: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    """Whether the native kernels can use the masks; the torch version says what is wrong."""
    return all(
        mask.dtype is torch.bool and mask.is_cpu and mask.shape == x.shape and alike((mask, x))
        for mask, x in zip(masks, tensors, strict=True)
    )


def _project(
    thetas: Sequence[Tensor],
    latents: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    scales: Sequence[float],
    cutoffs: Sequence[tuple[float, int]] | None,
    duals: Sequence[Dual] | None,
) -> None:
    for i, (theta, weight, mask) in enumerate(zip(thetas, weights, masks, strict=True)):
        copies = (latents[i],) if latents else ()
        begin = 0
        for x, w, keep, *latent in flat_pieces(theta, weight, mask, *copies):
            u = wide(flat(x)).abs()
            u = u if scales[i] == 1.0 else u * scales[i]
            if cutoffs is not None:
                threshold, tie_end = cutoffs[i]
                keep.copy_(unflat(kept(u, threshold, max(tie_end - begin, 0)), x))
            begin += x.numel()
            product = x if duals is None else unflat(duals[i].mask(u), x).mul(x)
            # Adding zero turns a kept -0.0 into 0.0.
            projected = torch.where(keep, product, 0.0).add_(0.0)
            for copy in latent:
                copy.copy_(x)
            w.copy_(projected)
