"""torch.fx graphs: tracing, folding batch norms, fusing additions and activations."""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from spartan.deploy.inference_layers import InferenceLayer, InferenceLinear
from spartan.errors import DeployError
from spartan.example_inputs import run_on

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ADDITIONS_IN_PLACE = {operator.iadd, "add_"}
_RELUS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_PLAIN = (bool, int, float, str)
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class _Proxy(fx.Proxy):
    """Records `x += y` as what it is; by itself torch.fx takes it for `x = x + y`."""

    def _change(self, function: Any, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._change(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._change(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._change(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._change(operator.itruediv, other)


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def trace(model: nn.Module, example_input: Any) -> fx.GraphModule | None:
    """Return the model as a graph that shares its modules, or None if it cannot be traced.

    Args:
        model: In evaluation mode.
        example_input: Arguments that it does not give keep their defaults. None: those that have a
            default keep it, and no shapes are noted.
    """
    left_out = _left_out(model, example_input)
    if left_out is None:
        return None
    try:
        graph = _Tracer().trace(model, concrete_args=left_out or None)
        for node in reversed(graph.nodes):
            node.type = None  # annotations that are kept as text cannot be pickled
            _keep_defaults(node, left_out)
        traced = fx.GraphModule(model, graph, type(model).__name__)
        if example_input is not None:
            _Shapes(traced).note(example_input)
    except Exception:
        # Tracing runs the user's code on stand-ins: whatever it raises, it cannot be traced.
        return None
    return traced


def _keep_defaults(node: fx.Node, left_out: Mapping[str, Any]) -> None:
    """Let arguments that are left out keep their names, and check that they keep their defaults."""
    if node.op == "placeholder":
        name = str(node.target).rpartition("_")[0]  # torch.fx numbers those it was given values for
        node.target = name if name in left_out else node.target
    elif getattr(node.target, "__name__", "") == "_assert_is_none":
        node.target = refuse_argument  # what torch checks with cannot be pickled
    elif node.target is torch._assert and "has been specialized" in str(node.args[1:]):
        compared = node.args[0]
        assert isinstance(compared, fx.Node)
        value, default = compared.args
        node.target, node.args = refuse_argument, (value, node.args[1], default)
        node.graph.erase_node(compared)


def refuse_argument(value: Any, message: str, default: Any = None) -> Any:
    """Refuse an argument that the example input did not give, unless it has its default.

    Raises:
        DeployError: It is given now.
    """
    if isinstance(value, fx.Proxy):  # a graph that is unpickled is traced again
        args = (value, message, default)
        return value.tracer.create_proxy("call_function", refuse_argument, args, {})
    if value is not default and value != default:
        name = message.split()[0]
        raise DeployError(
            f"The argument {name!r} was left out of the example input, so that the model was "
            "accelerated without it; accelerate it with an example that gives it."
        )
    return None


def _left_out(model: nn.Module, example_input: Any) -> dict[str, Any] | None:
    """Return the arguments that an example input leaves out, with their defaults.

    None if they rule out tracing: torch.fx takes plain values only.
    """
    parameters = inspect.signature(model.forward).parameters
    names = list(parameters)
    if example_input is None:
        given = {name for name, p in parameters.items() if p.default is p.empty}
    elif isinstance(example_input, Mapping):
        given = set(example_input)
    else:
        given = set(names[: len(example_input) if isinstance(example_input, tuple | list) else 1])
    plain = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
    left_out = {name: parameters[name].default for name in names if name not in given}
    known = all(value is None or type(value) in _PLAIN for value in left_out.values())
    return left_out if plain and known else None


def simplify(traced: fx.GraphModule) -> None:
    """Fold batch norms into the layers before them; drop what does nothing in evaluation."""
    counts = calls(traced)
    for node in list(traced.graph.nodes):
        module = module_of(traced, node)
        before = node.args[0] if module is not None and node.args else None
        if not isinstance(before, fx.Node):
            continue
        if isinstance(module, _NOTHING) and not module.training:
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
            continue
        layer = module_of(traced, before)
        if (
            len(before.users) != 1
            or counts[before.target] != 1
            or not _folds(before, layer, module)
        ):
            continue
        fold: Any = fuse_conv_bn_eval if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval
        traced.set_submodule(str(before.target), fold(layer, module))
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    _clean(traced)


def fuse(traced: fx.GraphModule) -> None:
    """Let sparse layers take over the addition and the activation that follow them.

    Between sparse linear layers, activations stay feature-major.
    """
    counts = calls(traced)
    for node in list(traced.graph.nodes):
        layer = module_of(traced, node)
        if not isinstance(layer, InferenceLayer) or counts[node.target] != 1:
            continue
        addition = only_user(node)
        addend = _addend(traced, node, addition)
        if addition is not None and addend is not None:
            addition.prepend(node)  # the addend is computed by then
            node.kwargs = {"addend": addend}
            addition.replace_all_uses_with(node)
            traced.graph.erase_node(addition)
        after = only_user(node)
        kind = _activation(traced, after)
        if after is not None and kind:
            layer.activation = kind
            after.replace_all_uses_with(node)
            traced.graph.erase_node(after)
        if isinstance(layer, InferenceLinear):
            users = [module_of(traced, user) for user in node.users]
            layer.feature_major = bool(users) and all(isinstance(u, InferenceLinear) for u in users)
    _clean(traced)


class _Shapes(fx.Interpreter):
    """Notes the shape of what each node returns, if that is a float32 tensor."""

    def note(self, example_input: Any) -> None:
        example_input = copy.deepcopy(example_input)  # the model may write into it
        if isinstance(example_input, Mapping):
            taken = [n for n in self.graph.nodes if n.op == "placeholder"]
            example_input = [example_input.get(n.target, *n.args) for n in taken]
        run_on(self.run, example_input)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            n.meta["shape"] = result.shape
        return result


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


def _folds(node: fx.Node, layer: nn.Module | None, norm: nn.Module | None) -> bool:
    if type(layer) is nn.Conv2d:
        fits = type(norm) is nn.BatchNorm2d
    else:  # of more dimensions, it is the second that is normalised
        matrix = len(node.meta.get("shape", ())) == 2
        fits = type(layer) is nn.Linear and type(norm) is nn.BatchNorm1d and matrix
    return fits and norm is not None and not norm.training and norm.running_mean is not None


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


def changes_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node may change a tensor that it is given."""
    named = str(getattr(node.target, "__name__", node.target))
    method = node.op == "call_method" and named.endswith("_")
    function = node.op == "call_function" and (
        named.endswith("_") or (named.startswith("i") and hasattr(operator, named))
    )
    asked = node.kwargs.get("inplace") or (node.op == "call_function" and True in node.args)
    return bool(getattr(module, "inplace", False)) or method or function or bool(asked)


def _activation(traced: fx.GraphModule, node: fx.Node | None) -> str:
    if node is None or len(node.args) != 1:
        return ""
    module = module_of(traced, node)
    if type(module) is nn.ReLU or calls_one_of(node, _RELUS):
        return "relu"
    exact = type(module) is nn.GELU and module.approximate == "none"
    return "gelu" if exact or (calls_one_of(node, {F.gelu}) and not node.kwargs) else ""


def _clean(traced: fx.GraphModule) -> None:
    traced.graph.lint()
    traced.delete_all_unused_submodules()
    traced.recompile()
