"""The state of a sparsifier's weights, and whether a saved one fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spartan.errors import StateError
from spartan.kernels import Dual
from spartan.methods.sites import Site

STATE_VERSION = 2


def state_of(site: Site) -> dict[str, Any]:
    """Return what a site needs to continue from."""
    return {
        "latent": site.latent.clone(),
        "mask": site.mask.clone(),
        "dual": None if site.dual is None else list(site.dual.astuple()),
        "active": site.active,
        **{key: value.clone() for key, value in site.tensors.items()},
    }


def restore(site: Site, state: Mapping[str, Any]) -> None:
    """Give a site the state that `state_of` returned."""
    saved = dict(state)
    site.latent.copy_(saved.pop("latent"))
    site.mask = torch.empty_like(site.mask).copy_(saved.pop("mask"))
    dual = saved.pop("dual")
    site.dual = None if dual is None else Dual(*dual)
    site.active = saved.pop("active")
    site.tensors = {k: v.to(site.mask.device, copy=True) for k, v in saved.items()}
    site.scratch.clear()


def check_state(
    state: Mapping[str, Any],
    settings: Mapping[str, Any],
    sites: Sequence[Site],
    groups: int,
    measured: bool = False,
) -> None:
    """Raise unless everything in `state` fits.

    Args:
        state: What `Sparsifier.state_dict` returned.
        settings: The settings of the sparsifier that loads it.
        sites: Its weights.
        groups: How many groups they form.
        measured: Whether the budgets were measured, and so differ each time.

    Raises:
        StateError: The message says what differs.
    """
    if state.get("version") != STATE_VERSION:
        raise StateError(
            f"The state has version {state.get('version')!r}, this is {STATE_VERSION}."
        )
    for key in ("settings", "step", "sites", "groups"):
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
    saved = state["sites"]
    other = sorted(set(saved) ^ {site.name for site in sites})
    if other:
        raise StateError(f"The state is of another model; it differs in {', '.join(other)}.")
    if len(state["groups"]) != groups:
        raise StateError(
            f"The state holds numbers for {len(state['groups'])} groups, this model has {groups}."
        )
    for site in sites:
        _check_site(dict(saved[site.name]), site)


def _check_budgets(saved: Any, own: Sequence[Sequence[float]]) -> None:
    same = [len(row) for row in saved] == [len(row) for row in own]
    if not same or not all(math.isfinite(x) and x > 0 for row in saved for x in row[1:]):
        raise StateError("The state is damaged: its measured budgets do not fit the weights.")


def _check_site(saved: dict[str, Any], site: Site) -> None:
    for key in ("latent", "mask", "dual", "active"):
        if key not in saved:
            raise StateError(f"The state holds no {key} of {site.name!r}.")
    _check_tensor("latent", saved.pop("latent"), [site.latent.shape], site.latent.dtype, site)
    _check_tensor("mask", saved.pop("mask"), [site.mask.shape], torch.bool, site)
    dual = saved.pop("dual")
    if dual is not None and len(dual) != 3:
        raise StateError(f"The state holds {dual!r} as dual of {site.name!r}, not three numbers.")
    saved.pop("active")
    for key, value in saved.items():
        dtype = value.dtype if isinstance(value, Tensor) else torch.float32
        # One number a unit, or one a weight.
        _check_tensor(key, value, [site.mask.shape, site.latent.shape], dtype, site)


def _check_tensor(
    key: str, found: object, shapes: Sequence[torch.Size], dtype: torch.dtype, site: Site
) -> None:
    if isinstance(found, Tensor) and found.shape in shapes and found.dtype == dtype:
        return
    given = _describe(found.shape, found.dtype) if isinstance(found, Tensor) else repr(found)
    raise StateError(
        f"The state holds {given} as {key} of {site.name!r}, this model needs "
        f"{_describe(shapes[0], dtype)}."
    )


def _describe(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"
