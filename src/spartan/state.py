"""Whether a saved state fits the sparsifier that is to continue from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spartan.errors import StateError
from spartan.methods.sites import Site

STATE_VERSION = 2


def check_state(
    state: Mapping[str, Any], settings: Mapping[str, Any], sites: Sequence[Site]
) -> None:
    """Raise unless everything in `state` fits.

    Args:
        state: What `Sparsifier.state_dict` returned.
        settings: The settings of the sparsifier that loads it.
        sites: Its weights.

    Raises:
        StateError: The message says what differs.
    """
    if state.get("version") != STATE_VERSION:
        raise StateError(
            f"The state has version {state.get('version')!r}, this is {STATE_VERSION}."
        )
    for key, value in state["settings"].items():
        if settings.get(key) != value:
            raise StateError(
                f"The state was saved with {key}={value}, this sparsifier has "
                f"{key}={settings.get(key)}: resume with the settings the run was begun with."
            )
    saved = state["sites"]
    other = sorted(set(saved) ^ {site.name for site in sites})
    if other:
        raise StateError(f"The state is of another model; it differs in {', '.join(other)}.")
    for site in sites:
        theirs = dict(saved[site.name])
        for key in ("latent", "mask", "dual", "active"):
            if key not in theirs:
                raise StateError(f"The state holds no {key} of {site.name!r}.")
        _check_tensor("latent", theirs.pop("latent"), site.latent.shape, site.latent.dtype, site)
        for key, value in theirs.items():
            if isinstance(value, Tensor):
                dtype = torch.bool if key == "mask" else value.dtype
                _check_tensor(key, value, site.mask.shape, dtype, site)


def _check_tensor(
    key: str, found: object, shape: torch.Size, dtype: torch.dtype, site: Site
) -> None:
    if isinstance(found, Tensor) and (found.shape, found.dtype) == (shape, dtype):
        return
    given = _describe(found.shape, found.dtype) if isinstance(found, Tensor) else repr(found)
    raise StateError(
        f"The state holds {given} as {key} of {site.name!r}, this model needs "
        f"{_describe(shape, dtype)}."
    )


def _describe(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"
