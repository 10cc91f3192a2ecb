"""`copy_model`: a deep copy of a model, or one sentence why there can be none."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor, nn

from spartan.errors import SpartanError


def copy_model(
    model: nn.Module, refuse: type[SpartanError] = SpartanError, *, shared: Iterable[Tensor] = ()
) -> nn.Module:
    """Return a deep copy of a model.

    Args:
        model: Any module.
        refuse: What is raised if it cannot be copied.
        shared: Tensors that the copy is to have too, instead of copies.

    Raises:
        SpartanError: It cannot.
    """
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    except Exception as error:
        raise refuse(
            f"The model cannot be copied: {error} If it was pruned with torch.nn.utils.prune or "
            "has weight norms, make them permanent first (prune.remove, remove_weight_norm)."
        ) from error
