"""`fuse`: sparse layers take over the norm, the addition and the activation that follow them."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from spartan.deploy.graph import refuse_argument
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


class FusedLayer:
    """A sparse layer, with what it takes over, as a function of a graph.

    Attributes:
        layer: The layer.
        norm: A batch norm in evaluation, or None.
        activation: `"none"`, `"relu"` or `"gelu"`.
        feature_major: Whether its outputs are stored outputs first.
    """

    __name__ = "fused_layer"

    def __init__(self, layer: InferenceLayer) -> None:
        self.layer = layer
        self.norm: nn.Module | None = None
        self.activation = "none"
        self.feature_major = False

    def __call__(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Apply to inputs, and add."""
        more = (True,) if self.feature_major else ()
        y: Tensor = self.layer.forward(x, addend, self.activation, self.norm, *more)
        return y


class CalledModule:
    """Another module as a function of a graph: it need not be looked up by name at each call."""

    __name__ = "called_module"

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it, with its hooks."""
        return self.module(*args, **kwargs)


def fuse(traced: fx.GraphModule) -> list[tuple[str, FusedLayer | CalledModule]]:
    """Let sparse layers take over what follows them, each in its own call.

    Between sparse linear layers, activations stay feature-major. The graph calls modules as
    functions afterwards.

    Returns:
        What the graph calls, with the name of the module.
    """
    calls: list[tuple[fx.Node, Any]] = []
    for node in list(traced.graph.nodes):
        module = module_of(traced, node)
        if isinstance(module, InferenceLayer):
            calls.append((node, _fuse_into(traced, node, module)))
        elif isinstance(module, NOTHING_IN_EVALUATION) and not _hooked(module):
            _take_over(node, node.args[0])
        elif node.op == "call_function" and node.target is refuse_argument:
            traced.graph.erase_node(node)  # the fast path looks at the arguments
    calls += [
        (node, CalledModule(module))
        for node in traced.graph.nodes
        if (module := module_of(traced, node)) and not isinstance(module, InferenceLayer)
    ]
    called = [(str(node.target), call) for node, call in calls]
    for node, call in calls:
        node.op, node.target = "call_function", call
    clean(traced)
    return called


def _fuse_into(traced: fx.GraphModule, node: fx.Node, layer: InferenceLayer) -> FusedLayer:
    call = FusedLayer(layer)
    after = only_user(node)
    norm = None if after is None else module_of(traced, after)
    if after is not None and follows_as_norm(node, layer, norm) and not _hooked(norm):
        call.norm = norm
        _take_over(after, node)
    addition = only_user(node)
    addend = _addend(traced, node, addition)
    if addition is not None and addend is not None:
        addition.prepend(node)  # the addend is computed by then
        node.kwargs = {"addend": addend}
        _take_over(addition, node)
    after = only_user(node)
    kind = _activation(traced, after)
    if after is not None and kind and not _hooked(module_of(traced, after)):
        call.activation = kind
        _take_over(after, node)
    users = [module_of(traced, user) for user in node.users]
    linear = [isinstance(module, InferenceLinear) for module in (layer, *users)]
    call.feature_major = bool(users) and all(linear)
    return call


def _hooked(module: nn.Module | None) -> bool:
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)


def _take_over(node: fx.Node, by: Any) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


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
