"""Names of parameters without what `torch.compile` and data-parallel wrappers put before them."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_COMPILED = "_orig_mod."


def wrapper_prefix(model: nn.Module) -> str:
    """Return the beginning that a wrapper of data-parallel training gives all names: or none."""
    inner = getattr(model, "_orig_mod", model)
    return "module." if isinstance(inner, DistributedDataParallel | DataParallel) else ""


def plain_name(name: str, prefix: str = "") -> str:
    """Return the name that a parameter has in the model itself.

    Args:
        name: As `named_parameters()` of the wrapped model gives it.
        prefix: What `wrapper_prefix` returned for that model.
    """
    return name.replace(_COMPILED, "").removeprefix(prefix)


def merged_name(name: str) -> str:
    """Return the name that a weight of a PEFT model has once its factors are merged into it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
