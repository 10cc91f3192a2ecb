"""Questions to a torch.fx graph: what calls what, and what changes in place."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import fx, nn

NOTHING_IN_EVALUATION = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
)

_NORM_AFTER = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}


def calls(traced: fx.GraphModule) -> Counter[Any]:
    """Return how often each module is called, counting twice what its call does not tell.

    That is: a module with hooks, or one of whose parameters is read apart from it.
    """
    counts = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            counts[str(node.target).rpartition(".")[0]] += 2
    for name in list(counts):
        module = traced.get_submodule(str(name))
        if module._forward_hooks or module._forward_pre_hooks:
            counts[name] += 2
    return counts


def module_of(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the one node that reads another, if it is one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def calls_one_of(node: fx.Node, targets: Collection[Any]) -> bool:
    """Whether a node calls one of these functions, or methods given by name."""
    # Modules are told by name too: theirs may be "relu".
    return node.op in ("call_function", "call_method") and node.target in targets


def changes_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node may change a tensor that it is given."""
    named = str(getattr(node.target, "__name__", node.target))
    method = node.op == "call_method" and named.endswith("_")
    function = node.op == "call_function" and (
        named.endswith("_") or (named.startswith("i") and hasattr(operator, named))
    )
    asked = (
        node.kwargs.get("inplace")
        or "out" in node.kwargs
        or (node.op == "call_function" and True in node.args)
    )
    return bool(getattr(module, "inplace", False)) or method or function or bool(asked)


def follows_as_norm(node: fx.Node, layer: nn.Module | None, norm: nn.Module | None) -> bool:
    """Whether a batch norm in evaluation normalises the outputs of the layer that a node calls."""
    if isinstance(layer, tuple(_NORM_AFTER)):
        fits = any(isinstance(layer, a) and type(norm) is b for a, b in _NORM_AFTER.items())
    else:  # of more dimensions, it is the second that is normalised
        matrix = len(node.meta.get("shape", ())) == 2
        fits = isinstance(layer, nn.Linear) and type(norm) is nn.BatchNorm1d and matrix
    return fits and norm is not None and not norm.training and norm.running_mean is not None


def clean(traced: fx.GraphModule) -> None:
    """Check a changed graph, and make its code anew."""
    traced.graph.lint()
    traced.delete_all_unused_submodules()
    traced.recompile()
