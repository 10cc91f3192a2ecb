"""Refuses parameters whose values cannot be masked in place, such as sharded or quantised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spartan.errors import NonFiniteError, PrunableError, some_of
from spartan.weights.prunable import Prunable


def check_maskable(weights: Sequence[Prunable]) -> None:
    """Raise unless the values of all weights are there, as plain strided tensors, and finite.

    Raises:
        PrunableError: A parameter is of another kind; the message names all of that kind.
        NonFiniteError: A weight holds NaN or infinity.
    """
    found: dict[str, list[str]] = {}
    for weight in weights:
        hindrance = _hindrance(weight.parameter)
        if hindrance is not None:
            found.setdefault(hindrance, []).append(weight.name)
    if found:
        hindrance, names = next(iter(found.items()))
        raise PrunableError(f"{some_of(names)}: {hindrance}")
    for weight in weights:
        if not bool(torch.isfinite(weight.parameter).all()):
            raise NonFiniteError(f"The weight {weight.name!r} holds NaN or infinity.")


def _hindrance(parameter: nn.Parameter) -> str | None:
    """Say why a parameter cannot be masked, and what to do."""
    kind = type(parameter).__name__
    if parameter.is_meta:
        return "on the meta device there are no values to rank; load the model first."
    if kind == "FlatParameter":
        return "FSDP has flattened weights into one, which cannot be masked; train with DDP."
    if kind == "DTensor" or type(parameter.data).__name__ == "DTensor":
        return (
            "sharded parameters (DTensor) are not supported; make the sparsifier before sharding."
        )
    if type(parameter.data) not in (Tensor, nn.Parameter):
        return (
            f"a {type(parameter.data).__name__} is not a plain tensor (quantised or wrapped); "
            "prune first and quantise after it, or exclude it."
        )
    if parameter.layout != torch.strided:
        return f"the layout is {parameter.layout}; make it dense with .to_dense()."
    if parameter.is_inference():
        return (
            "made in torch.inference_mode(), it cannot be trained; make or copy the model outside."
        )
    if any(
        stride == 0 and size > 1
        for stride, size in zip(parameter.stride(), parameter.shape, strict=True)
    ):
        return "entries share memory (expand): give it memory of its own with .clone()."
    return None
