"""Whether a saved state fits the sparsifier that is to continue from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
        for key, mine in _tensors(site).items():
            theirs = saved[site.name].get(key)
            if theirs is None or theirs.shape != mine.shape or theirs.dtype != mine.dtype:
                raise StateError(
                    f"The state holds {_describe(theirs)} as {key} of {site.name!r}, this model "
                    f"needs {_describe(mine)}."
                )


def _tensors(site: Site) -> dict[str, Tensor]:
    return {"latent": site.latent, "mask": site.mask, **site.tensors}


def _describe(tensor: Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
