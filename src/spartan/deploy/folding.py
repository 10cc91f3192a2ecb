"""`fold_norms`: batch norms go into the layers before them, and what does nothing goes."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from spartan.deploy.graph_nodes import (
    NOTHING_IN_EVALUATION,
    calls,
    clean,
    follows_as_norm,
    module_of,
)
from spartan.errors import DeployError


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
        if isinstance(layer, nn.Linear):  # of more dimensions, the norm normalises the second
            with traced.graph.inserting_before(before):
                checked = traced.graph.call_function(require_matrix, (before.args[0],))
            before.args = (checked,)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    clean(traced)


def require_matrix(x: Tensor) -> Tensor:
    """Return a tensor of (samples, features), which a folded norm of one dimension needs.

    Raises:
        DeployError: It has other dimensions.
    """
    if isinstance(x, fx.Proxy):  # a graph that is unpickled is traced again
        return cast("Tensor", x.tracer.create_proxy("call_function", require_matrix, (x,), {}))
    if x.dim() != 2:
        raise DeployError(
            f"A norm of this model was folded for inputs of two dimensions, and this has {x.dim()}:"
            " purge the model with an example like it."
        )
    return x
