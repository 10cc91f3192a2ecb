"""`purge`: a smaller dense model without the channels that carry nothing, whole or part by part."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from spartan.copies import copy_model
from spartan.deploy.comparison import (
    TOLERANCE,
    dense_copy,
    relative_error,
    require_layers,
    run_on_example,
)
from spartan.deploy.folding import fold_norms
from spartan.deploy.graph import trace
from spartan.deploy.purging import purge_graph
from spartan.errors import DeployError
from spartan.example_inputs import tensors_of


@dataclass(frozen=True)
class Purged:
    """A model without the channels that carry nothing.

    Attributes:
        model: The smaller model.
        removed: Outputs that are no longer computed, by layer.
        kept: Layers that still compute outputs of zeros, and why.
    """

    model: nn.Module
    removed: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def purge(model: nn.Module, example_input: Any = None) -> nn.Module:
    """Return a smaller dense model that computes the same, without the channels that carry nothing.

    For Linear and convolution layers whose weights were pruned by `Channel()`, or by
    `Channel(inputs=True)`; zeros inside of channels stay, and images come in batches. Batch norms
    are folded into the layers before them, residual connections keep their width. The result is in
    evaluation mode and shares nothing with the model.

    A model that torch.fx can trace becomes a graph. Of others, given an example, the parts that can
    be traced become graphs, and a warning names what stays.

    Args:
        model: Any model; it is not changed.
        example_input: One input (a tensor, a tuple or a dict). With it, more batch norms can be
            folded, and the outputs of both models are compared, also for a larger batch.

    Raises:
        DeployError: torch.fx cannot trace the model and there is no example, or the outputs differ
            by more than 1e-5.
    """
    purged = purge_channels(model, example_input)
    if example_input is not None:
        _refuse_difference(model, purged.model, example_input)
    if purged.kept:
        layer, reason = next(iter(purged.kept.items()))
        others = f" (and {len(purged.kept) - 1} more layers)" if len(purged.kept) > 1 else ""
        warnings.warn(
            f"{layer!r}{others} still computes outputs that are zero: {reason}.",
            UserWarning,
            stacklevel=2,
        )
    return purged.model


def purge_channels(model: nn.Module, example_input: Any = None) -> Purged:
    """Do the work of `purge`, and say what was removed; outputs are not compared."""
    require_layers(model, "made smaller: purge the model that it was made from")
    work = dense_copy(model).eval()
    removed = _purge_feed_forwards(work)
    try:
        traced = trace(copy_model(work, DeployError), example_input)
    except DeployError as error:
        if example_input is None:
            raise DeployError(
                f"This model has no graph that says which layer reads which channel: {error}. "
                "Give an example input, and the parts of it that can be traced are purged."
            ) from error
        parts = _Parts(work, example_input)
        kept = parts.purge(str(error))
        return Purged(work, removed | parts.removed, kept)
    fold_norms(traced)
    return Purged(traced, removed | purge_graph(traced))


class _Parts:
    """Purges the largest parts of a model that can be traced, each by itself.

    Attributes:
        removed: Outputs that are no longer computed, by layer.

    Args:
        model: Changed in place.
        example_input: One input.
    """

    def __init__(self, model: nn.Module, example_input: Any) -> None:
        self.removed: dict[str, int] = {}
        self._model = model
        self._calls = _calls(copy_model(model, DeployError), example_input)
        self._reasons: dict[str, str] = {}

    def purge(self, reason: str) -> dict[str, str]:
        """Replace parts; return the layers that still compute zeros, and why.

        Args:
            reason: Why the whole model cannot be traced.
        """
        self._reasons[""] = reason
        for name, child in self._model.named_children():
            self._visit(name, child)
        return {
            name: self._reason(name)
            for name, layer in self._model.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
            and not layer.weight.flatten(1).any(1).all()
            and self._reason(name)
        }

    def _visit(self, name: str, part: nn.Module) -> None:
        if not any(_mixes(layer) for layer in part.modules()) or _mixes(part):
            return
        try:
            graph, removed = self._purged(part, self._calls.get(name))
        except DeployError as error:
            self._reasons[name] = str(error)
            for key, child in part.named_children():
                self._visit(f"{name}.{key}", child)
            return
        self._reasons[name] = ""
        if removed:
            self._model.set_submodule(name, graph)
            self.removed |= {f"{name}.{layer}": count for layer, count in removed.items()}

    def _purged(self, part: nn.Module, call: Any) -> tuple[nn.Module, dict[str, int]]:
        if isinstance(part, nn.ModuleList | nn.ModuleDict):
            raise DeployError("it is a list, which its owner runs")
        if not call:
            raise DeployError("it is called with several kinds of arguments, or not at all")
        graph = trace(copy_model(part, DeployError), call)
        fold_norms(graph)
        removed = purge_graph(graph)
        with torch.inference_mode():
            wanted = run_on_example(copy_model(part, DeployError), call)
            error = relative_error(run_on_example(graph, call), wanted)
        if not error <= _tolerance(wanted):
            raise DeployError(f"its graph computes something else (relative error {error:.1e})")
        return graph, removed

    def _reason(self, name: str) -> str:
        """Return why the smallest part around a layer was not traced; nothing if it was."""
        while name not in self._reasons:
            name = name.rpartition(".")[0]
        return self._reasons[name]


def _mixes(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _calls(model: nn.Module, example_input: Any) -> dict[str, Any]:
    """Return, for each module that is always called in one way, its arguments by name."""
    calls: dict[str, Any] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            try:
                bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
            except TypeError:
                calls[name] = None
                return
            given = dict(list(bound.arguments.items())[1:])
            before = calls.get(name, given)
            same = before is not None and before.keys() == given.keys()
            same = same and all(type(before[key]) is type(given[key]) for key in given)
            calls[name] = given if same else None

        return hook

    for name, module in model.named_modules():
        module.register_forward_pre_hook(note(name), with_kwargs=True)
    with torch.inference_mode():
        run_on_example(model, example_input)
    return calls


def _purge_feed_forwards(model: nn.Module) -> dict[str, int]:
    """Purge what lies between the two linear layers of torch's transformer layers, in place."""
    removed: dict[str, int] = {}
    for name, layer in model.named_modules():
        if type(layer) not in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
            continue
        pair: tuple[Any, Any] = (layer.linear1, layer.linear2)
        if any(type(m) is not nn.Linear or m._forward_hooks or m._forward_pre_hooks for m in pair):
            continue
        with contextlib.suppress(DeployError):  # an activation that cannot be traced
            graph = trace(_FeedForward(layer).eval(), None)
            for key, count in purge_graph(graph, in_place=True).items():
                removed[f"{name}.{key}"] = count
    return removed


class _FeedForward(nn.Module):
    """The two linear layers of a transformer layer, and the activation between them."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.linear1, self.activation, self.linear2 = layer.linear1, layer.activation, layer.linear2

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, width) to (…, width)."""
        y: Tensor = self.linear2(self.activation(self.linear1(x)))
        return y


def _refuse_difference(model: nn.Module, purged: nn.Module, example_input: Any) -> None:
    for example in (example_input, _larger(example_input)):
        with torch.inference_mode():
            try:
                expected = run_on_example(dense_copy(model).eval(), example)
            except DeployError:
                if example is example_input:
                    raise
                continue  # not every model takes every batch
            found = run_on_example(copy_model(purged, DeployError), example, "purged model")
            error = relative_error(found, expected)
        if not error <= _tolerance(expected):
            raise DeployError(
                f"The purged model's output differs by {error:.1e}; keep the model as it is, and "
                "please report its structure."
            )


def _larger(example_input: Any) -> Any:
    """Return an input of twice the batch: another, for code that branches on sizes or counts."""

    def twice(x: Any) -> Any:
        return torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() else x

    return tree_map(
        twice, dict(example_input) if isinstance(example_input, Mapping) else example_input
    )


def _tolerance(expected: Any) -> float:
    # Half precision cannot agree to more than it resolves.
    resolved = [torch.finfo(x.dtype).eps for x in tensors_of(expected) if x.is_floating_point()]
    return max([TOLERANCE, *(4 * eps for eps in resolved)])
