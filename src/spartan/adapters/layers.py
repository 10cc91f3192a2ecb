"""Finds a transformer's layers, attention outputs and feed-forward outputs, in any library.

A layer is known by its parts: what projects the attention's output, and what projects the output of
the feed-forward network. That finds BERT, RoBERTa, DistilBERT, ELECTRA, DeBERTa, MPNet, ViT, GPT-2,
Llama and their relatives, and `nn.TransformerEncoder`. Other models are told by paths.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from spartan.errors import AdapterError, did_you_mean

_ATTENTION_OUTPUT = (
    "attention.output.dense",  # BERT, RoBERTa, ELECTRA, DeBERTa
    "attention.out_lin",  # DistilBERT
    "attention.attn.o",  # MPNet
    "attention.o_proj",  # ViT
    "attn.c_proj",  # GPT-2
    "self_attn.o_proj",  # Llama
    "self_attn",  # torch: fuses the projection, so the whole attention
)
_FFN_OUTPUT = ("output.dense", "ffn.lin2", "mlp.fc2", "mlp.c_proj", "mlp.down_proj", "linear2")
# Norms after the last residual sum. Models that normalize first have none.
_OUTPUT_NORM = ("output.LayerNorm", "output_layer_norm", "norm2")


@dataclass(frozen=True)
class Layer:
    """One layer of the backbone.

    Attributes:
        path: Its name in the model.
        module: The layer.
        width: Size of what it hands on; None if nothing tells.
    """

    path: str
    module: nn.Module
    width: int | None

    @property
    def attention_output(self) -> str:
        """Path of what gives the attention's output, before the residual sum."""
        return self._part(_ATTENTION_OUTPUT, "the output projection of its attention")

    @property
    def ffn_output(self) -> str:
        """Path of what gives the feed-forward network's output, before the residual sum."""
        return self._part(_FFN_OUTPUT, "the last projection of its feed-forward network")

    @property
    def output_norm(self) -> str | None:
        """Path of the norm after the last residual sum; None if there is none."""
        if getattr(self.module, "norm_first", False):
            return None
        found = _first(self.module, _OUTPUT_NORM)
        return found and f"{self.path}.{found}"

    def _part(self, candidates: Sequence[str], what: str) -> str:
        found = _first(self.module, candidates)
        if found is None:
            raise AdapterError(
                f"{self.path} ({type(self.module).__name__}) does not show {what}: none of "
                f"{', '.join(candidates)} is there. The memory needs only the layer itself."
            )
        return f"{self.path}.{found}"


def find_layers(model: nn.Module, target: str | Sequence[int] | Sequence[str]) -> list[Layer]:
    """Return the layers that an adapter is for.

    Args:
        model: The backbone.
        target: As `AdapterConfig.target_layers`.

    Raises:
        AdapterError: There are none, more than one list of them, or a name or number is unknown.
    """
    if target == "all":
        return _layers(model, _only_list(model))
    names = [target] if isinstance(target, str) else list(target)
    if not names:
        raise AdapterError("target_layers is empty: give 'all', numbers of layers, or paths.")
    numbers = [n for n in names if isinstance(n, int) and not isinstance(n, bool)]
    paths = [n for n in names if isinstance(n, str)]
    if len(numbers) == len(names):
        return _numbered(_layers(model, _only_list(model)), numbers)
    if len(paths) == len(names):
        return _layers(model, [found for path in paths for found in _named(model, path)])
    raise AdapterError(f"target_layers={target!r} must be 'all', numbers, or paths.")


def width_of(layers: Sequence[Layer]) -> int:
    """Return the width of all layers.

    Raises:
        AdapterError: It is not known, or they differ.
    """
    widths = [layer.width for layer in layers if layer.width is not None]
    if len(widths) < len(layers) or len(set(widths)) != 1:
        raise AdapterError(
            f"The width of {', '.join(layer.path for layer in layers)} cannot be told; give "
            "hidden_size=."
        )
    return widths[0]


def _layers(model: nn.Module, paths: Sequence[str]) -> list[Layer]:
    return [
        Layer(path, module := model.get_submodule(path), _width(model, module))
        for path in dict.fromkeys(paths)
    ]


def _only_list(model: nn.Module) -> list[str]:
    lists = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(map(_is_layer, module)):
            lists[path] = [f"{path}.{i}".lstrip(".") for i in range(len(module))]
    if len(lists) == 1:
        return next(iter(lists.values()))
    if not lists:
        raise AdapterError(
            f"No transformer layers were found in {type(model).__name__}. Give target_layers= the "
            "path of the list that holds them, or the paths of the modules whose output is to be "
            "changed."
        )
    raise AdapterError(
        f"{type(model).__name__} has several lists of layers ({', '.join(lists)}): give "
        "target_layers= one of these paths."
    )


def _is_layer(module: nn.Module) -> bool:
    parts = _first(module, _ATTENTION_OUTPUT), _first(module, _FFN_OUTPUT)
    return None not in parts


def _first(module: nn.Module, candidates: Sequence[str]) -> str | None:
    return next((path for path in candidates if _get(module, path) is not None), None)


def _get(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _numbered(layers: list[Layer], numbers: Sequence[int]) -> list[Layer]:
    for number in numbers:
        if not -len(layers) <= number < len(layers):
            raise AdapterError(
                f"target_layers asks for layer {number}; there are {len(layers)}, 0 to "
                f"{len(layers) - 1}."
            )
    return [layers[i] for i in sorted({number % len(layers) for number in numbers})]


def _named(model: nn.Module, name: str) -> list[str]:
    modules = dict(model.named_modules())
    module = modules.get(name)
    if isinstance(module, nn.ModuleList | nn.Sequential):
        return [f"{name}.{key}" for key, _ in module.named_children()]
    found = [path for path in modules if path and _matches(path, name)]
    if not found:
        raise AdapterError(
            f"target_layers names {name!r}, which {type(model).__name__} does not have; "
            + did_you_mean(name, [path for path in modules if path])
        )
    return found


def _matches(path: str, glob: str) -> bool:
    """Whether a path matches part by part: a star stands for one part, or for some of it."""
    parts, globs = path.split("."), glob.split(".")
    return len(parts) == len(globs) and all(map(fnmatch.fnmatchcase, parts, globs))


def _width(model: nn.Module, layer: nn.Module) -> int | None:
    ffn = _first(layer, _FFN_OUTPUT)
    if ffn is not None:
        projection: Any = layer.get_submodule(ffn)
        # Conv1D of transformers calls it nf.
        size = getattr(projection, "out_features", None) or projection.nf
    else:
        size = getattr(getattr(model, "config", None), "hidden_size", None)
    return size if isinstance(size, int) else None
