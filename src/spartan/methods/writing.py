"""θ → w: writing parameters, latent copies and masks of many sites at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from torch import Tensor

from spartan import kernels
from spartan.kernels import Dual, units
from spartan.kernels.scores import wide
from spartan.methods.sites import Site


def write_kept(sites: Sequence[Site]) -> None:
    """Write w = θ, or θ · m for sites with a dual variable, where the mask keeps it."""
    for alike in _alike([site for site in sites if site.elementwise]):
        for site, dual in zip(alike, project(alike), strict=True):
            site.stepping = False
            if site.choice is not None:
                site.settle(dual)
    for site in sites:
        if not site.elementwise:
            write_scaled(site, site.mask)


def write_scaled(site: Site, factors: Tensor) -> None:
    """Write w = θ times a factor for each unit, a number or a boolean."""
    latent = site.latent if site.stepping else None
    factors = factors.to(wide(site.latent[:0]).dtype)
    units.scale(site.theta, factors, latent, site.parameter, site.grid)
    site.stepping = site.sampled = False


def write_given(sites: Sequence[Site], materialize: Callable[[Site], Tensor]) -> None:
    """Write what `materialize` returns, site by site."""
    for site in sites:
        weight = materialize(site)
        if site.stepping:
            site.latent.copy_(site.theta)
        site.weight.parameter.copy_(weight)
        site.stepping = False


def project(sites: Sequence[Site], into: Sequence[Tensor] | None = None) -> Sequence[Dual | None]:
    """Write the weights of elementwise sites that are alike in what they have.

    Args:
        sites: All with a choice or all without, all with a soft mask or all without, all inside a
            step or all outside.
        into: Tensors to write to instead of the parameters, of sites without a choice. θ then stays
            where it is.

    Returns:
        The dual variable of each site's soft mask, None without one.
    """
    choices = [site.choice for site in sites if site.choice is not None]
    duals = [c.dual for c in choices] if choices else [site.dual for site in sites]
    used = [dual for dual in duals if dual is not None]
    stepping = sites[0].stepping and into is None
    kernels.project(
        [site.theta for site in sites],
        [site.latent for site in sites] if stepping else [],
        [site.parameter for site in sites] if into is None else into,
        [site.stored_mask for site in sites],
        [site.scale for site in sites],
        [(c.threshold, c.stop) for c in choices] or None,
        used or None,
    )
    return duals


def _alike(sites: Sequence[Site]) -> Iterator[list[Site]]:
    def kind(site: Site) -> tuple[bool, bool, bool]:
        dual = site.choice.dual if site.choice else site.dual
        return site.stepping, site.choice is not None, dual is not None

    for _, run in groupby(sorted(sites, key=kind), key=kind):
        yield list(run)
