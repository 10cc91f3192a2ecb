"""Finds a model's prunable weights: default layers, `include=` and `exclude=`.

By default: every floating-point `weight` with at least two dimensions of Linear and convolution
layers, the projections of multi-head attention (also the fused `in_proj_weight`) and Hugging Face
`Conv1D`. Biases, norms and embeddings stay dense, and so does a Linear tied to an embedding.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spartan.errors import PrunableError, did_you_mean

NameFilter = str | Sequence[str] | Callable[[str, nn.Parameter], bool]

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True, eq=False)
class Prunable:
    """One parameter that a budget speaks of.

    Attributes:
        name: Its (first) name in `model.named_parameters()`.
        parameter: The parameter itself.
        input_first: Whether it is stored as (in, out, …), as Hugging Face `Conv1D` and transposed
            convolutions do, instead of (out, in, …).
    """

    name: str
    parameter: nn.Parameter
    input_first: bool = False

    @property
    def shape(self) -> torch.Size:
        """Shape as stored."""
        return self.parameter.shape

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def kept(self) -> int:
        """Number of weights that are not zero, counted."""
        return int(self.parameter.detach().count_nonzero())

    @property
    def oriented_shape(self) -> tuple[int, ...]:
        """Shape as (out, in, …)."""
        out, inputs, *rest = self.shape
        return (inputs, out, *rest) if self.input_first else (out, inputs, *rest)

    @property
    def kernel_numel(self) -> int:
        """Number of kernel positions of a convolution; 1 for a matrix."""
        return math.prod(self.shape[2:])


def find_prunable(
    model: nn.Module, include: NameFilter | None = None, exclude: NameFilter | None = None
) -> list[Prunable]:
    """List the prunable parameters of a model, each tied parameter once.

    Args:
        model: Any module.
        include: Keeps only what it names: parameter names, module names (all prunable weights
            below), globs such as `"encoder.*"`, or a predicate on (name, parameter). A full
            parameter name also adds a parameter that is not prunable by default.
        exclude: Takes away what it names, in the same words.

    Raises:
        PrunableError: A name matches nothing, or nothing is left to prune.
    """
    names = _all_names(model)
    layouts = _default_layouts(model)
    chosen = _match(include, names, layouts) if include is not None else set(layouts)
    if exclude is not None:
        chosen -= _match(exclude, names, set(names))

    found = [
        Prunable(name, parameter, layouts.get(parameter, False))
        for name, parameter in model.named_parameters()
        if parameter in chosen and parameter.numel() > 0
    ]
    if not found:
        total = len(list(model.parameters()))
        raise PrunableError(
            f"Nothing to prune: none of the model's {total} parameters is left. Prunable are "
            "weights of Linear, convolution and attention layers; check include= and exclude=, "
            "or name other parameters in include=."
        )
    return found


def _all_names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise PrunableError(
                f"Parameter {name!r} has no shape yet (lazy module): run one batch through the "
                "model before sparsifying it."
            )
        names.setdefault(parameter, []).append(name)
    return names


def _default_layouts(model: nn.Module) -> dict[nn.Parameter, bool]:
    """Map each default-prunable parameter to whether it is stored input-first."""
    layouts: dict[nn.Parameter, bool] = {}
    embeddings: set[Tensor] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            embeddings.add(module.weight)
        for key, input_first in _prunable_attributes(module):
            weight = module._parameters.get(key)
            if weight is not None and weight.dim() >= 2 and weight.is_floating_point():
                layouts.setdefault(weight, input_first)
    return {weight: first for weight, first in layouts.items() if weight not in embeddings}


def _prunable_attributes(module: nn.Module) -> list[tuple[str, bool]]:
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        # With groups, no dimension of the stored weight is "the outputs".
        return [("weight", True)] if module.groups == 1 else []
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        return [("weight", False)]
    if isinstance(module, nn.MultiheadAttention):
        return [(key, False) for key in _ATTENTION_WEIGHTS]
    if any(cls.__name__ == "Conv1D" and hasattr(module, "nf") for cls in type(module).__mro__):
        return [("weight", True)]
    return []


def _match(
    wanted: NameFilter, names: dict[nn.Parameter, list[str]], default: Collection[nn.Parameter]
) -> set[nn.Parameter]:
    if callable(wanted):
        return {p for p in default if any(wanted(name, p) for name in names[p])}
    chosen: set[nn.Parameter] = set()
    for word in [wanted] if isinstance(wanted, str) else wanted:
        hits = {p for p, aliases in names.items() if any(_names(word, a) for a in aliases)}
        if not hits:
            known = {alias for aliases in names.values() for alias in aliases}
            known |= {name.rpartition(".")[0] for name in known} - {""}
            raise PrunableError(f"No parameter is named {word!r}; {did_you_mean(word, known)}")
        exact = {p for p in hits if word in names[p] and p.dim() >= 2 and p.is_floating_point()}
        chosen |= exact | {p for p in hits if p in default}
    return chosen


def _names(word: str, name: str) -> bool:
    return name == word or name.startswith(word + ".") or fnmatch.fnmatchcase(name, word)
