"""Makes a copy of a model exact: an average, an earlier state, a state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from spartan.errors import StateError
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.weights.names import merged_name, plain_name, wrapper_prefix

Keep = Literal["own", "model"]  # what `finalize` keeps where others have written
Target = TypeVar("Target", bound=nn.Module | Mapping[str, Any])


@torch.no_grad()
def project_onto_masks(target: Target, weights: Sequence[MaskedWeight]) -> Target:
    """Set to zero, in place, what the masks of now prune.

    Args:
        target: A copy of the model, also in an `AveragedModel` or another wrapper, or with factors
            of LoRA merged into it; or a state dict.
        weights: The weights that are masked.

    Returns:
        The target.

    Raises:
        StateError: It lacks a weight, or holds it in another shape. Nothing is changed then.
    """
    tensors = _tensors_of(target)
    if not any(weight.name in tensors for weight in weights):  # LoRA is merged in the copy
        tensors = {w.name: tensors[m] for w in weights if (m := merged_name(w.name)) in tensors}
    for weight in weights:
        found = tensors.get(weight.name)
        if found is None or found.shape != weight.prunable.shape:
            given = "nothing" if found is None else f"a tensor of shape {tuple(found.shape)}"
            raise StateError(
                f"What is to be projected holds {given} as {weight.name!r}, and the mask has "
                f"shape {tuple(weight.prunable.shape)}: give a copy of the model or its state dict."
            )
    for weight in weights:
        tensor = tensors[weight.name]
        tensor.mul_(weight.spread(weight.mask).to(tensor.device)).add_(0.0)  # -0.0 becomes 0.0
    return target


def _tensors_of(target: nn.Module | Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a copy by the names that they have in the model itself."""
    if isinstance(target, nn.Module):
        named: dict[str, Any] = dict(target.named_parameters(remove_duplicate=False))
        inner = getattr(target, "module", None)
        wraps = isinstance(inner, nn.Module) and all(n.startswith("module.") for n in named)
        prefix = "module." if wraps else wrapper_prefix(target)
    elif isinstance(target, Mapping):
        named = dict(target)
        # So an AveragedModel's state is: everything in `module`, and a counter.
        rest = {name for name in named if not name.startswith("module.")}
        prefix = "module." if rest <= {"n_averaged"} else ""
    else:
        raise StateError(f"project() takes a model or a state dict, not a {type(target).__name__}.")
    return {
        plain_name(name, prefix): value.detach()
        for name, value in named.items()
        if isinstance(value, Tensor)
    }
