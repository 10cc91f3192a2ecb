"""What can go wrong with gates, and is told."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from spartan.errors import BudgetError
from spartan.kernels.units import pool_magnitudes
from spartan.methods.groups import Group
from spartan.methods.sites import Site

# The loss does not hear a gate where the sum of G · θ is that much smaller than that of |G · θ|.
_UNHEARD = 1e-3
_MISS = 0.05  # densities that are further apart are worth a warning


def warn_unheard(sites: Sequence[Site]) -> None:
    """Warn of gates that the loss cannot hear: a norm behind them takes their scale away."""
    unheard = []
    for site in sites:
        grad, scratch = site.required_grad, site.scratch
        drawn = scratch["gate"] > 0
        if site.pattern.unit_numel(site.weight) == 1 or not bool(drawn.any()):
            continue
        sum_of_products = site.pool_product(grad).abs()[drawn]
        products = pool_magnitudes((grad * site.latent).contiguous(), site.grid, drawn.shape)[drawn]
        if float(sum_of_products.sum()) < _UNHEARD * float(products.sum()):
            unheard.append(site.name)
    if unheard:
        warnings.warn(
            f"The loss does not change with the gates of {', '.join(map(repr, unheard))}: a norm "
            "follows each of their units and takes its scale away, so that chance would select. "
            "Gate what reads these channels: Channel(inputs=True).",
            stacklevel=2,
        )


def warn_idle(groups: Sequence[Group]) -> None:
    """Warn of weights without a gradient, whose gates cannot learn."""
    idle = [s.name for group in groups for s in group.sites if "pulled" not in s.scratch]
    if idle:
        warnings.warn(
            f"No gradient reaches {', '.join(map(repr, idle))}, so that their gates learn nothing "
            "and lose against all others: exclude these weights, or train them.",
            stacklevel=2,
        )


def warn_missed(group: Group) -> None:
    """Say that the gates alone did not come near what is selected now."""
    expected, target = group.numbers["expected"], group.share.kept / group.share.total
    if abs(expected - target) > _MISS:
        warnings.warn(
            f"The gates of {group.sites[0].name!r} and its group reached an expected density of "
            f"{expected:.3g}, not {target:.3g}; the exact selection makes up the difference. Train "
            "for more steps, or raise gate_lr and dual_lr.",
            stacklevel=2,
        )


def refuse_too_little(group: Group) -> None:
    """Raise `BudgetError` if a budget, other than 0, has no room for a unit of each layer."""
    least = sum(site.cost for site in group.sites)
    if 0 < group.share.kept < least:
        names = ", ".join(repr(site.name) for site in group.sites[:3])
        names += ", …" if len(group.sites) > 3 else ""
        raise BudgetError(
            f"A density of {group.share.kept / group.share.total:.3g} has no room for one unit of "
            f"each of {len(group.sites)} layers ({names}); the smallest reachable density is "
            f"{least / group.share.total:.3g}. Raise it, exclude layers, or let layers go with "
            "keep_one=False."
        )
