"""Parameters from which a weight is computed: parametrizations, weight norms, torch's pruning."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize


def computed_parameters(model: nn.Module) -> dict[nn.Parameter, str]:
    """Map each parameter that is not the weight itself to what it is instead, in words.

    A zero in such a parameter is no zero of the weight, and zeros in some (the direction of a
    weight norm) are divided by.
    """
    found: dict[nn.Parameter, str] = {}
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            kinds = ", ".join(type(step).__name__.lstrip("_") for step in module)
            for own in module.parameters(recurse=False):
                found[own] = f"parametrized by {kinds}"
        for key, parameter in module._parameters.items():
            kind = _old_style(module, key)
            if parameter is not None and kind is not None:
                found[parameter] = kind
    return found


def _old_style(module: nn.Module, key: str) -> str | None:
    """Say what a hook of torch before parametrizations does with a parameter of a module."""
    name = key.removesuffix("_orig").removesuffix("_v").removesuffix("_g")
    weight = getattr(module, name, None)  # recomputed by the hook, so no parameter any more
    if name == key or isinstance(weight, nn.Parameter) or not isinstance(weight, Tensor):
        return None
    if f"{name}_mask" in module._buffers:
        return "masked by torch.nn.utils.prune"
    return "under a weight or spectral norm"
