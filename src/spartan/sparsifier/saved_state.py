"""Saves and restores the state of a masking run, and checks first whether it fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spartan.budgets.group_budget import GroupBudget
from spartan.errors import StateError
from spartan.kernels import Dual
from spartan.methods.masking.contract import MaskingMethod
from spartan.methods.masking.groups import BudgetGroup
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.methods.masking.state import GroupState, restored, saved
from spartan.sparsifier.old_states import as_begun, check_step, understood, upgraded

STATE_VERSION = 5  # earlier ones: see `old_states`


def run_state(
    settings: Mapping[str, Any],
    step: int,
    weights: Sequence[MaskedWeight],
    groups: Sequence[BudgetGroup],
) -> dict[str, Any]:
    """Return the state of a run after a step."""
    return {
        "version": STATE_VERSION,
        "settings": dict(settings),
        "step": step,
        "weights": {weight.name: state_of(weight) for weight in weights},
        "groups": tuple(saved(group.state) for group in groups),
    }


@dataclass(frozen=True)
class SavedRun:
    """A state that was read, and fits.

    Attributes:
        step: The step after which it was saved.
        method: The method as it was begun with.
        weights: The weights as they were, in the order of the model.
        groups: What their groups kept.
        floors: What each weight of a group keeps at least; none for states of before there were.
        budgets: Those that were measured when the run was begun; None where none are measured.
    """

    step: int
    method: MaskingMethod
    weights: list[MaskedWeight]
    groups: list[GroupState]
    floors: list[list[int]]
    budgets: Sequence[Sequence[float]] | None


def read_run(
    state: Mapping[str, Any],
    settings: Mapping[str, Any],
    method: MaskingMethod,
    weights: Sequence[MaskedWeight],
    groups: Sequence[BudgetGroup],
    total_steps: int,
    measured: bool,
) -> SavedRun:
    """Read a state for the weights and groups of a run, and change nothing.

    Args:
        state: What `run_state` returned.
        settings: Those of the run that loads it.
        method: Its method.
        weights: Its weights.
        groups: Its groups.
        total_steps: Its steps.
        measured: Whether the budgets were measured, and so differ each time.

    Raises:
        StateError: The state does not fit, or is not whole.
    """
    with understood():
        method, floors = as_begun(method, settings["floors"], state)
        settings = {**settings, "method": method.settings(), "floors": floors}
        state = upgraded(state, method.weight_state, method.group_state)
        check_state(state, settings, weights, len(groups), measured)
        device, step = weights[0].latent.device, int(state["step"])
        group_states = [restored(method.group_state, one, device) for one in state["groups"]]
        found = [restored_weight(weight, state["weights"][weight.name]) for weight in weights]
    for one in found:
        missing = method.lacks(one, step, total_steps)
        if missing is not None:
            raise StateError(
                f"The state of {one.name!r} holds no {missing}, which there is after step {step}: "
                "only a part of it was saved or loaded."
            )
    budgets = state["settings"]["budgets"] if measured else None
    return SavedRun(step, method, found, group_states, floors, budgets)


def go_on_from(
    saved: SavedRun, weights: Sequence[MaskedWeight], groups: Sequence[BudgetGroup]
) -> None:
    """Let the weights and groups of a run go on from a state that was read for them."""
    for weight, one in zip(weights, saved.weights, strict=True):
        take(weight, one)
    for group, own, kept in zip(groups, saved.groups, saved.floors, strict=True):
        group.state = own
        if not kept:
            group.lift_floors()
    if saved.budgets is not None:
        # What was measured when the run was begun, not what was measured again just now.
        for group, (kept_units, total, *costs) in zip(groups, saved.budgets, strict=True):
            group.adopt(GroupBudget(group.budget.members, tuple(costs), total, kept_units))


def state_of(weight: MaskedWeight) -> dict[str, Any]:
    """Return what a weight needs to continue from.

    The keys are always the same, and what comes and goes during a run is one value, in a tuple:
    `torch.distributed.checkpoint` loads into a state of another step, entry by entry.
    """
    own = {
        "dual": None if weight.dual is None else list(weight.dual.astuple()),
        "active": weight.active,
        "newborn": weight.newborn,
        "state": saved(weight.state),
    }
    return {"latent": weight.latent.clone(), "mask": weight.mask.clone(), "own": (own,)}


def restored_weight(weight: MaskedWeight, state: Mapping[str, Any]) -> MaskedWeight:
    """Return a weight as `state_of` told of it, for the same parameter; nothing is changed yet.

    Raises:
        StateError: The state is of another method.
    """
    (own,) = state["own"]
    kind = type(weight.state)
    return dataclasses.replace(
        weight,
        latent=torch.empty_like(weight.latent).copy_(state["latent"]),
        stored_mask=torch.empty_like(weight.mask).copy_(state["mask"]),
        dual=None if own["dual"] is None else Dual(*own["dual"]),
        active=own["active"],
        newborn=own["newborn"],
        state=restored(kind, own["state"], weight.mask.device),
        stepping=False,
        pending=None,
        counted=None,
    )


def take(weight: MaskedWeight, other: MaskedWeight) -> None:
    """Let a weight go on from where another, restored one is."""
    for field in ("latent", "dual", "active", "newborn", "state"):
        setattr(weight, field, getattr(other, field))
    weight.mask = other.stored_mask


def check_state(
    state: Mapping[str, Any],
    settings: Mapping[str, Any],
    weights: Sequence[MaskedWeight],
    groups: int,
    measured: bool = False,
) -> None:
    """Raise unless everything in `state` fits.

    Args:
        state: What `Sparsifier.state_dict` returned.
        settings: The settings of the sparsifier that loads it.
        weights: Its weights.
        groups: How many groups they form.
        measured: Whether the budgets were measured, and so differ each time.

    Raises:
        StateError: The message says what differs.
    """
    if state.get("version") != STATE_VERSION:
        raise StateError(
            f"The state has version {state.get('version')!r}, this is {STATE_VERSION}."
        )
    for key in ("settings", "step", "weights", "groups"):
        if key not in state:
            raise StateError(f"The state is damaged: it holds no {key}.")
    check_step(state["step"])
    if set(state["settings"]) != set(settings):
        differing = ", ".join(sorted(set(state["settings"]) ^ set(settings)))
        raise StateError(f"The state is damaged: its settings differ in {differing}.")
    for key, value in state["settings"].items():
        if key == "budgets" and measured:
            _check_budgets(value, settings[key])
        elif settings.get(key) != value:
            raise StateError(
                f"The state was saved with {key}={value}, this sparsifier has "
                f"{key}={settings.get(key)}: resume with the settings the run was begun with."
            )
    known = state["weights"]
    other = sorted(set(known) ^ {weight.name for weight in weights})
    if other:
        raise StateError(f"The state is of another model; it differs in {', '.join(other)}.")
    if len(state["groups"]) != groups:
        raise StateError(
            f"The state holds numbers for {len(state['groups'])} groups, this model has {groups}."
        )
    for weight in weights:
        _check_weight(dict(known[weight.name]), weight)


def _check_budgets(saved: Any, own: Sequence[Sequence[float]]) -> None:
    same = [len(row) for row in saved] == [len(row) for row in own]
    if not same or not all(math.isfinite(x) and x > 0 for row in saved for x in row[1:]):
        raise StateError("The state is damaged: its measured budgets do not fit the weights.")


def _check_weight(values: dict[str, Any], weight: MaskedWeight) -> None:
    for key in ("latent", "mask", "own"):
        if key not in values:
            raise StateError(f"The state holds no {key} of {weight.name!r}.")
    (own,) = values.pop("own") if len(values["own"]) == 1 else ({},)
    for key in ("dual", "active", "newborn", "state"):
        if key not in own:
            raise StateError(f"The state holds no {key} of {weight.name!r}.")
    latent = values.pop("latent")
    _check_tensor("latent", latent, [weight.latent.shape], weight.latent.dtype, weight)
    _check_finite(weight, latent)
    _check_tensor("mask", values.pop("mask"), [weight.mask.shape], torch.bool, weight)
    dual = own["dual"]
    if dual is not None and len(dual) != 3:
        raise StateError(f"The state holds {dual!r} as dual of {weight.name!r}, not three numbers.")
    for key, value in own["state"].items():
        if isinstance(value, Tensor):  # one number a unit, or one a weight
            shapes = [weight.mask.shape, weight.latent.shape]
            _check_tensor(key, value, shapes, value.dtype, weight)


def _check_finite(weight: MaskedWeight, latent: Tensor) -> None:
    if not bool(torch.isfinite(latent).all()):
        raise StateError(f"The state is damaged: the latent {weight.name!r} holds NaN or infinity.")


def _check_tensor(
    key: str, found: object, shapes: Sequence[torch.Size], dtype: torch.dtype, weight: MaskedWeight
) -> None:
    if isinstance(found, Tensor) and found.shape in shapes and found.dtype == dtype:
        return
    given = _describe(found.shape, found.dtype) if isinstance(found, Tensor) else repr(found)
    raise StateError(
        f"The state holds {given} as {key} of {weight.name!r}, this model needs "
        f"{_describe(shapes[0], dtype)}."
    )


def _describe(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"
