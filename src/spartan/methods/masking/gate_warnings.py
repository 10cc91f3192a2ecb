"""Warnings for L0 gates that cannot learn, and refusal of budgets too small for them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from spartan.errors import BudgetError
from spartan.kernels.units import pool_magnitudes
from spartan.methods.masking.gates_state import GateGroup, gates_of
from spartan.methods.masking.groups import BudgetGroup
from spartan.methods.masking.masked_weight import MaskedWeight

# The loss does not depend on a gate where the sum of G · θ is so much smaller than that of
# |G · θ|: it is what rounding leaves of a zero.
_NO_EFFECT = 1e-3
# Densities that are further apart are worth a warning: what exact selection then adds or takes
# changes the network that was trained.
_MISS = 0.05


def warn_without_effect(weights: Sequence[MaskedWeight]) -> None:
    """Warn of gates that the loss does not depend on: a norm behind them takes their scale away."""
    without = []
    for weight in weights:
        grad, sample = weight.required_grad, gates_of(weight).sample
        assert sample is not None
        drawn = sample.gate > 0
        if weight.pattern.unit_numel(weight.prunable) == 1 or not bool(drawn.any()):
            continue
        sum_of_products = weight.pool_product(grad).abs()[drawn]
        products = pool_magnitudes((grad * weight.latent).contiguous(), weight.grid, drawn.shape)[
            drawn
        ]
        if float(sum_of_products.sum()) < _NO_EFFECT * float(products.sum()):
            without.append(weight.name)
    if without:
        warnings.warn(
            f"The loss does not change with the gates of {', '.join(map(repr, without))}: a norm "
            "follows each of their units and takes its scale away, so that chance would select. "
            "Gate what reads these channels: Channel(inputs=True).",
            stacklevel=2,
        )


def warn_idle(groups: Sequence[BudgetGroup]) -> None:
    """Warn of weights without a gradient, whose gates cannot learn."""
    idle = [w.name for g in groups for w in g.weights if gates_of(w).pulled is None]
    if idle:
        warnings.warn(
            f"No gradient reaches {', '.join(map(repr, idle))}, so that their gates learn nothing "
            "and lose against all others: exclude these weights, or train them.",
            stacklevel=2,
        )


def warn_missed(group: BudgetGroup) -> None:
    """Say that the gates alone did not come near what is selected now."""
    expected, target = group.state_as(GateGroup).expected, group.budget.kept / group.budget.total
    assert expected is not None
    if abs(expected - target) > _MISS:
        warnings.warn(
            f"The gates of {group.weights[0].name!r} and its group reached an expected density of "
            f"{expected:.3g}, not {target:.3g}; the exact selection makes up the difference. Train "
            "for more steps, or raise gate_lr and dual_lr.",
            stacklevel=2,
        )


def refuse_too_little(group: BudgetGroup) -> None:
    """Raise `BudgetError` if a budget, other than 0, has no room for a unit of each layer."""
    least = sum(weight.cost for weight in group.weights)
    if 0 < group.budget.kept < least:
        names = ", ".join(repr(weight.name) for weight in group.weights[:3])
        names += ", …" if len(group.weights) > 3 else ""
        raise BudgetError(
            f"A density of {group.budget.kept / group.budget.total:.3g} has no room for one unit "
            f"of each of {len(group.weights)} layers ({names}); the smallest reachable density is "
            f"{least / group.budget.total:.3g}. Raise it, exclude layers, or let layers go with "
            "keep_one=False."
        )
