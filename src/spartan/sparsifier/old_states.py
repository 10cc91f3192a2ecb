"""Reads sparsifier states: refuses what is none, upgrades those of earlier versions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from spartan.errors import StateError
from spartan.methods.masking.constrained_l0 import ConstrainedL0
from spartan.methods.masking.contract import MaskingMethod
from spartan.methods.masking.gates_state import Gates
from spartan.methods.masking.norm_follows import GRADIENTS
from spartan.methods.masking.soft_mask import SoftMask
from spartan.methods.masking.spartan import Spartan
from spartan.methods.masking.state import Forecast, GroupState, WeightState


@contextmanager
def understood() -> Iterator[None]:
    """Read a state; whatever it holds in the place of what is expected is `StateError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        kind = type(error).__name__
        raise StateError(
            f"The state is damaged, or is none of a sparsifier ({kind}: {error})."
        ) from error


def check_step(step: object) -> None:
    """Raise `StateError` unless this is a number of steps."""
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise StateError(f"The state is damaged: it was saved after step {step!r}.")


# What differed in the defaults up to version 4.
_ONCE = (Spartan(beta=(1.0, 20.0), warmup=0.2, annealing="linear"), ConstrainedL0(sampled=1.0))
# Settings that there were not, and what says the same.
_NEW_SETTINGS = {"sampled": 1.0}


def as_begun(
    method: MaskingMethod, floors: list[list[int]], state: Mapping[str, Any]
) -> tuple[MaskingMethod, list[list[int]]]:
    """Return method, and floors of each group, with the defaults of the version that saved a state.

    A run goes on as it was begun. Up to version 4 there were no floors, and a run that was begun
    then has none since.
    """
    told = state.get("settings", {})
    if state.get("version") not in (2, 3, 4):
        without: list[list[int]] = [[] for _ in floors]
        return method, without if told.get("floors") == without else floors
    begun = {**_NEW_SETTINGS, **told.get("method", {})}
    for default in (one for one in _ONCE if type(one) is type(method)):
        once, here, now = (x.settings() for x in (default, method, type(method)()))
        left = [k for k in once if here[k] == now[k] and begun.get(k) == once[k] != now[k]]
        method = type(method)(**{**vars(method), **{key: getattr(default, key) for key in left}})
    return method, [[] for _ in floors]


_RENAMED = {"gate": "fixed"}  # fields of weights


def upgraded(
    state: Mapping[str, Any], weight_state: type[WeightState], group_state: type[GroupState]
) -> Mapping[str, Any]:
    """Return a state of version 2, 3 or 4 as one of version 5; others as they are.

    In version 4 Spartan multiplied every weight by its soft mask, and all gates were drawn.
    """
    state = _as_version_4(state, weight_state, group_state)
    if state.get("version") != 4:
        return state
    if not {"weights", "settings", "groups"} <= set(state):
        return {**state, "version": 5}
    method = dict(state["settings"]["method"])
    if issubclass(weight_state, Gates):
        method = {**_NEW_SETTINGS, **method}
    settings = {**state["settings"], "method": method, "floors": [[] for _ in state["groups"]]}
    state = {**state, "version": 5, "settings": settings}
    if weight_state is not SoftMask:
        return state
    decided = {"hard": False, "gradients": GRADIENTS}
    weights = {}
    for name, values in state["weights"].items():
        (own,) = values["own"]
        weights[name] = {**values, "own": ({**own, "state": {**decided, **own["state"]}},)}
    return {**state, "weights": weights}


def _as_version_4(
    state: Mapping[str, Any], weight_state: type[WeightState], group_state: type[GroupState]
) -> Mapping[str, Any]:
    """Return a state of version 2 or 3 as one of version 4; others as they are.

    Version 3 kept everything of a weight side by side, and knew no weights that began as zeros.
    """
    state = _as_version_3(state, weight_state, group_state)
    if state.get("version") != 3 or not {"weights", "groups"} <= set(state):
        return state
    weights: dict[str, dict[str, Any]] = {}
    for name, values in state["weights"].items():
        own = {k: v for k, v in values.items() if k not in ("latent", "mask")}
        plain = {k: values[k] for k in ("latent", "mask") if k in values}
        weights[name] = {**plain, "own": ({"newborn": False, **own},)}
    return {**state, "version": 4, "weights": weights, "groups": tuple(state["groups"])}


def _as_version_3(
    state: Mapping[str, Any], weight_state: type[WeightState], group_state: type[GroupState]
) -> Mapping[str, Any]:
    """Return a state of version 2 as one of version 3; others as they are.

    Version 2 kept the tensors of a weight beside its mask, and all numbers in its group, under keys
    like "threshold drift" (of the group) and "rate fc.weight" (of one weight).
    """
    if state.get("version") != 2 or "sites" not in state or "groups" not in state:
        return state
    weights: dict[str, dict[str, Any]] = {}
    for name, tensors in state["sites"].items():
        plain = ("latent", "mask", "dual", "active")
        own = {_RENAMED.get(k, k): v for k, v in tensors.items() if k not in plain}
        weights[name] = {**{k: tensors[k] for k in plain if k in tensors}, "state": own}
    groups = []
    for numbers in state["groups"]:
        own_group: dict[str, Any] = {}
        for key, value in numbers.items():
            whole = key.removesuffix(" drift")
            field, _, name = whole.partition(" ")
            if name and name not in weights:
                raise StateError(f"The state holds {key!r}, and no weight {name!r}.")
            holder, kind = (
                (weights[name]["state"], weight_state) if name else (own_group, group_state)
            )
            _put(holder, kind, field, value, drift=whole != key)
        groups.append(own_group)
    rest = {k: v for k, v in state.items() if k not in ("sites", "groups", "version")}
    return {**rest, "version": 3, "weights": weights, "groups": groups}


def _put(
    holder: dict[str, Any],
    kind: type[WeightState] | type[GroupState],
    field: str,
    value: float,
    drift: bool,
) -> None:
    """Set a number, in the type that it has today."""
    default = getattr(kind(), field, None)
    if isinstance(default, Forecast):
        holder.setdefault(field, [None, None])[int(drift)] = value
    elif field in {one.name for one in dataclasses.fields(kind)}:
        holder[field] = bool(value) if isinstance(default, bool) else value
    else:
        raise StateError(f"The state holds {field!r}, which this method does not keep.")


def upgraded_growth(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state of growth of version 1 or 2 as one of version 3; others as they are."""
    if state.get("version") == 1 and "sites" in state:
        rest = {key: value for key, value in state.items() if key != "sites"}
        state = {**rest, "version": 2, "weights": state["sites"]}
    if state.get("version") != 2 or "weights" not in state:
        return state
    weights = {name: (values,) for name, values in state["weights"].items()}
    return {**state, "version": 3, "weights": weights}
