"""`fold_norms`: batch norms go into the layers before them, and what does nothing goes."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from spartan.deploy.graph_nodes import (
    NOTHING_IN_EVALUATION,
    calls,
    clean,
    follows_as_norm,
    module_of,
)


def fold_norms(traced: fx.GraphModule) -> None:
    """Fold batch norms into the layers before them; drop what does nothing in evaluation."""
    counts = calls(traced)
    for node in list(traced.graph.nodes):
        module = module_of(traced, node)
        before = node.args[0] if module is not None and node.args else None
        if not isinstance(before, fx.Node):
            continue
        if isinstance(module, NOTHING_IN_EVALUATION) and not module.training:
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
            continue
        layer = module_of(traced, before)
        plain = type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
        once = len(before.users) == 1 and counts[before.target] == 1
        if not (plain and once and follows_as_norm(before, layer, module)):
            continue
        fold: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        traced.set_submodule(str(before.target), fold(layer, module))
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    clean(traced)
