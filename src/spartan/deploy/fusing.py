"""`fuse`: sparse layers take over the norm, the addition and the activation that follow them."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from spartan.deploy.graph_nodes import (
    NOTHING_IN_EVALUATION,
    calls_one_of,
    changes_in_place,
    clean,
    follows_as_norm,
    module_of,
    only_user,
)
from spartan.deploy.inference_layers import InferenceLayer, InferenceLinear

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ADDITIONS_IN_PLACE = {operator.iadd, "add_"}
_RELUS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}


def fuse(traced: fx.GraphModule) -> None:
    """Let sparse layers take over what follows them, each in its own call.

    Between sparse linear layers, activations stay feature-major.
    """
    for node in list(traced.graph.nodes):
        module = module_of(traced, node)
        if isinstance(module, NOTHING_IN_EVALUATION) and not _hooked(module):
            _take_over(node, node.args[0])
        if not isinstance(module, InferenceLayer):
            continue
        after = only_user(node)
        norm = None if after is None else module_of(traced, after)
        if after is not None and follows_as_norm(node, module, norm) and not _hooked(norm):
            with traced.graph.inserting_before(node):
                node.kwargs = {**node.kwargs, "norm": _parts(traced, str(after.target), norm)}
            _take_over(after, node)
        addition = only_user(node)
        addend = _addend(traced, node, addition)
        if addition is not None and addend is not None:
            addition.prepend(node)  # the addend is computed by then
            node.kwargs = {**node.kwargs, "addend": addend}
            _take_over(addition, node)
        after = only_user(node)
        kind = _activation(traced, after)
        if after is not None and kind and not _hooked(module_of(traced, after)):
            node.kwargs = {**node.kwargs, "activation": kind}
            _take_over(after, node)
        if isinstance(module, InferenceLinear):
            users = [module_of(traced, user) for user in node.users]
            if users and all(isinstance(user, InferenceLinear) for user in users):
                node.kwargs = {**node.kwargs, "feature_major": True}
    clean(traced)


def _hooked(module: nn.Module | None) -> bool:
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)


def _take_over(node: fx.Node, by: Any) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _parts(traced: fx.GraphModule, name: str, norm: Any) -> tuple[Any, ...]:
    """Return nodes for the tensors of a batch norm, as `inference_layers.Norm` has them."""

    def read(tensor: str) -> fx.Node | None:
        present = getattr(norm, tensor) is not None
        return traced.graph.get_attr(f"{name}.{tensor}") if present else None

    return (*map(read, ("weight", "bias", "running_mean", "running_var")), norm.eps)


def _addend(traced: fx.GraphModule, node: fx.Node, addition: fx.Node | None) -> fx.Node | None:
    """Return what is added to a node, if that is all that happens to it."""
    if addition is None or not calls_one_of(addition, _ADDITIONS) or addition.kwargs:
        return None
    if len(addition.args) != 2:
        return None
    left, right = addition.args
    other = right if left is node else left
    if not isinstance(other, fx.Node) or other is node:
        return None
    if calls_one_of(addition, _ADDITIONS_IN_PLACE) and left is not node:
        return None  # it is the other that changes
    same = other.meta.get("shape") == node.meta.get("shape") is not None
    return other if same and not _changes_between(traced, node, addition) else None


def _changes_between(traced: fx.GraphModule, first: fx.Node, last: fx.Node) -> bool:
    """Whether a tensor may be changed in place between two nodes."""
    node = first.next
    while node is not last:
        if changes_in_place(node, module_of(traced, node)):
            return True
        node = node.next
    return False


def _activation(traced: fx.GraphModule, node: fx.Node | None) -> str:
    if node is None or len(node.args) != 1:
        return ""
    module = module_of(traced, node)
    if type(module) is nn.ReLU or calls_one_of(node, _RELUS):
        return "relu"
    exact = type(module) is nn.GELU and module.approximate == "none"
    return "gelu" if exact or (calls_one_of(node, {F.gelu}) and not node.kwargs) else ""
