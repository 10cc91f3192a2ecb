"""Saves and restores the state of a masking run, and checks first whether it fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spartan.errors import StateError
from spartan.kernels import Dual
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.methods.masking.state import WeightState, restored, saved

STATE_VERSION = 3  # 2: see `old_states`


def state_of(weight: MaskedWeight) -> dict[str, Any]:
    """Return what a weight needs to continue from."""
    return {
        "latent": weight.latent.clone(),
        "mask": weight.mask.clone(),
        "dual": None if weight.dual is None else list(weight.dual.astuple()),
        "active": weight.active,
        "state": saved(weight.state),
    }


def restored_weight(
    weight: MaskedWeight, state: Mapping[str, Any], kind: type[WeightState]
) -> WeightState:
    """Return the method's part of what `state_of` returned.

    Raises:
        StateError: It is of another method.
    """
    return restored(kind, state["state"], weight.mask.device)


def restore(weight: MaskedWeight, state: Mapping[str, Any], own: WeightState) -> None:
    """Give a weight the state that `state_of` returned, and the method's part of it."""
    weight.latent.copy_(state["latent"])
    weight.mask = torch.empty_like(weight.mask).copy_(state["mask"])
    weight.dual = None if state["dual"] is None else Dual(*state["dual"])
    weight.active = state["active"]
    weight.state = own


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
    for key in ("latent", "mask", "dual", "active", "state"):
        if key not in values:
            raise StateError(f"The state holds no {key} of {weight.name!r}.")
    _check_tensor(
        "latent", values.pop("latent"), [weight.latent.shape], weight.latent.dtype, weight
    )
    _check_tensor("mask", values.pop("mask"), [weight.mask.shape], torch.bool, weight)
    dual = values.pop("dual")
    if dual is not None and len(dual) != 3:
        raise StateError(f"The state holds {dual!r} as dual of {weight.name!r}, not three numbers.")
    for key, value in values["state"].items():
        if isinstance(value, Tensor):  # one number a unit, or one a weight
            shapes = [weight.mask.shape, weight.latent.shape]
            _check_tensor(key, value, shapes, value.dtype, weight)


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
