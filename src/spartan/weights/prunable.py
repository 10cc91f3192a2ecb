"""Finds a model's prunable weights: default layers, `include=` and `exclude=`.

By default: every floating-point `weight` with at least two dimensions of Linear and convolution
layers, the projections of multi-head attention (also the fused `in_proj_weight`) and Hugging Face
`Conv1D`. Biases, norms and embeddings stay dense, and so do a Linear tied to an embedding, the
factors of LoRA (`lora_…`), and layers whose weight is computed from other parameters.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from spartan.errors import PrunableError, did_you_mean, some_of
from spartan.weights.computed import computed_parameters
from spartan.weights.names import plain_name, wrapper_prefix

NameFilter = str | Sequence[str] | Callable[[str, nn.Parameter], bool]

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_LORA = re.compile(r"(^|\.)lora_", re.IGNORECASE)
_LAYOUT = re.compile(r"^(?P<word>.+):(?P<layout>out,in|in,out)$")


@dataclass(frozen=True, eq=False)
class Prunable:
    """One parameter that a budget speaks of.

    Attributes:
        name: Its (first) name in `model.named_parameters()`, without what wrappers such as
            `torch.compile` put before it.
        parameter: The parameter itself.
        input_first: Whether it is stored as (in, out, …), as Hugging Face `Conv1D` and transposed
            convolutions do, instead of (out, in, …).
        stacked: Whether it holds the matrices of several experts, (experts, out, in) or, with
            `input_first`, (experts, in, out).
        layout_known: Whether it is known which of its dimensions are inputs.
        depthwise: Whether it is a convolution with one filter for each channel.
    """

    name: str
    parameter: nn.Parameter
    input_first: bool = False
    stacked: bool = False
    layout_known: bool = True
    depthwise: bool = False

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
    def experts(self) -> int:
        """Number of matrices that are stacked; 1 for every other weight."""
        return self.shape[0] if self.stacked else 1

    @property
    def oriented_shape(self) -> tuple[int, ...]:
        """Shape as (out, in, …), of one expert where several are stacked."""
        out, inputs, *rest = self.shape[1:] if self.stacked else self.shape
        return (inputs, out, *rest) if self.input_first else (out, inputs, *rest)

    @property
    def outputs(self) -> int:
        """Number of outputs, of all experts."""
        return self.experts * self.oriented_shape[0]

    @property
    def output_dims(self) -> tuple[int, ...]:
        """The dimensions, as stored, that number the outputs."""
        outputs = int(self.input_first) + int(self.stacked)
        return (0, outputs) if self.stacked else (outputs,)

    @property
    def kernel_numel(self) -> int:
        """Number of kernel positions of a convolution; 1 for a matrix."""
        return math.prod(self.oriented_shape[2:])


def find_prunable(
    model: nn.Module, include: NameFilter | None = None, exclude: NameFilter | None = None
) -> list[Prunable]:
    """List the prunable parameters of a model, each tied parameter once.

    Args:
        model: Any module.
        include: Keeps only what it names: parameter names, module names (all prunable weights
            below), globs such as `"encoder.*"`, or a predicate on (name, parameter). A full
            parameter name also adds a parameter that is not prunable by default; so does the name
            of a module or a glob that names no others: the matrices of an RNN, of an `nn.Bilinear`,
            of experts stacked in one parameter. `"experts.w:in,out"` and `"experts.w:out,in"` say
            in which order a parameter holds them; patterns other than single weights need it.
        exclude: Takes away what it names, in the same words.

    Raises:
        PrunableError: A word matches nothing, or adds or removes nothing, or nothing is left to
            prune.
    """
    names = _all_names(model)
    layouts = _default_layouts(model, names)
    chosen = set(layouts) if include is None else _included(include, names, layouts, model)
    if exclude is not None:
        chosen -= _excluded(exclude, names, chosen)

    depthwise = {
        module.weight
        for module in model.modules()
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1
    }
    found = [
        replace(
            _described(
                names[parameter][0], parameter, layouts, model, _said_layout(include, aliases)
            ),
            depthwise=parameter in depthwise,
        )
        for parameter, aliases in names.items()
        if parameter in chosen and parameter.numel() > 0
    ]
    if not found:
        computed = computed_parameters(model)
        reasons = [f" {names[p][0]!r} is {computed[p]}." for p in names if p in computed]
        raise PrunableError(
            f"Nothing to prune: none of the model's {len(names)} parameters is left. Prunable are "
            "floating-point weights of Linear, convolution and attention layers; check include= "
            f"and exclude=, or name other parameters in include=.{''.join(reasons[:1])}"
        )
    return found


def _all_names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return every parameter, in the order of the model, with all its names."""
    prefix = wrapper_prefix(model)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise PrunableError(
                f"Parameter {name!r} has no shape yet (lazy module): run one batch through the "
                "model before sparsifying it."
            )
        names.setdefault(parameter, []).append(plain_name(name, prefix))
    return names


# What is prunable by default -----------------------------------------------------------------


def _default_layouts(
    model: nn.Module, names: dict[nn.Parameter, list[str]]
) -> dict[nn.Parameter, bool]:
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
    return {
        weight: first
        for weight, first in layouts.items()
        if weight not in embeddings and not any(map(_LORA.search, names[weight]))
    }


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


# What words name -----------------------------------------------------------------------------


def _included(
    wanted: NameFilter,
    names: dict[nn.Parameter, list[str]],
    default: Collection[nn.Parameter],
    model: nn.Module,
) -> set[nn.Parameter]:
    if callable(wanted):
        return _where(wanted, names, default)
    computed = computed_parameters(model)
    chosen: set[nn.Parameter] = set()
    for word in map(_without_layout, _words(wanted)):
        hits = _hits(word, names)
        exact = {p for p in hits if word in names[p] and _is_matrix(p)}
        for parameter in exact & set(computed):
            raise PrunableError(
                f"include={word!r} names a parameter that is {computed[parameter]}: zeros in it "
                "are not zeros of the weight. Make the weight a plain parameter first "
                "(torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or "
                "prune.remove)."
            )
        addable = {p for p in hits - set(computed) if _is_matrix(p) and _may_be_added(p, model)}
        owned = {p for p in addable if any(n.rpartition(".")[0] == word for n in names[p])}
        added = exact | owned | {p for p in hits if p in default}
        added = added or {p for p in addable if not any(map(_LORA.search, names[p]))}
        if not added:
            raise PrunableError(_adds_nothing(word, names, hits, computed))
        chosen |= added
    return chosen


def _adds_nothing(
    word: str,
    names: dict[nn.Parameter, list[str]],
    hits: set[nn.Parameter],
    computed: Mapping[nn.Parameter, str],
) -> str:
    said = f"include={word!r} adds nothing:"
    for parameter in (p for p in names if p in hits and p in computed):
        return f"{said} {names[parameter][0]!r} is {computed[parameter]}. Leave the word out."
    matrices = [names[p][0] for p in names if p in hits and _is_matrix(p)]
    if matrices:
        return f"{said} name the parameter itself to prune it ({matrices[0]!r})."
    return f"{said} no floating-point matrix is in {_examples(names, hits)}. Leave the word out."


def _excluded(
    wanted: NameFilter, names: dict[nn.Parameter, list[str]], chosen: set[nn.Parameter]
) -> set[nn.Parameter]:
    if callable(wanted):
        return _where(wanted, names, set(names))
    removed: set[nn.Parameter] = set()
    for word in _words(wanted):
        hits = _hits(word, names)
        if not hits & chosen:
            raise PrunableError(
                f"exclude={word!r} removes nothing: {_examples(names, hits)} would not be pruned "
                "without it either. Leave the word out."
            )
        removed |= hits
    return removed


def _words(wanted: str | Sequence[str]) -> list[str]:
    return [wanted] if isinstance(wanted, str) else list(wanted)


def _without_layout(word: str) -> str:
    found = _LAYOUT.match(word)
    return found["word"] if found else word


def _hits(word: str, names: dict[nn.Parameter, list[str]]) -> set[nn.Parameter]:
    hits = {p for p, aliases in names.items() if any(_names(word, a) for a in aliases)}
    if not hits:
        known = {alias for aliases in names.values() for alias in aliases}
        known |= {name.rpartition(".")[0] for name in known} - {""}
        raise PrunableError(f"No parameter is named {word!r}; {did_you_mean(word, known)}")
    return hits


def _names(word: str, name: str) -> bool:
    return name == word or name.startswith(word + ".") or fnmatch.fnmatchcase(name, word)


def _where(
    wanted: Callable[[str, nn.Parameter], bool],
    names: dict[nn.Parameter, list[str]],
    among: Collection[nn.Parameter],
) -> set[nn.Parameter]:
    return {p for p in among if any(wanted(name, p) for name in names[p])}


def _examples(names: dict[nn.Parameter, list[str]], hits: set[nn.Parameter]) -> str:
    return some_of(names[p][0] for p in names if p in hits)


def _is_matrix(parameter: nn.Parameter) -> bool:
    return parameter.dim() >= 2 and parameter.is_floating_point()


def _may_be_added(parameter: nn.Parameter, model: nn.Module) -> bool:
    """Whether a module's name stands for this parameter too: not for embeddings and norms."""
    for module in model.modules():
        if any(parameter is own for own in module._parameters.values()):
            kind = type(module).__name__
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) or "Norm" in kind:
                return False
    return True


# How a parameter divides into inputs and outputs ----------------------------------------------


def _said_layout(include: NameFilter | None, aliases: list[str]) -> str | None:
    """Return the layout that a word of `include=` gives a parameter."""
    if include is None or callable(include):
        return None
    for found in filter(None, map(_LAYOUT.match, _words(include))):
        if any(_names(found["word"], alias) for alias in aliases):
            return found["layout"]
    return None


def _described(
    name: str,
    parameter: nn.Parameter,
    layouts: dict[nn.Parameter, bool],
    model: nn.Module,
    said: str | None,
) -> Prunable:
    if parameter in layouts:
        return Prunable(name, parameter, layouts[parameter])
    owner = next(m for m in model.modules() if any(parameter is p for p in m._parameters.values()))
    known = isinstance(owner, nn.RNNBase | nn.RNNCellBase | nn.Bilinear | nn.Embedding)
    kernel = isinstance(owner, nn.modules.conv._ConvNd)  # a transposed one with groups
    stacked = not (known or kernel) and parameter.dim() == 3
    transposed = getattr(owner, "is_transposed", None)  # so say the experts of transformers
    if stacked and said is None and isinstance(transposed, bool):
        said = "in,out" if transposed else "out,in"
    return Prunable(name, parameter, said == "in,out", stacked, known or said is not None)
