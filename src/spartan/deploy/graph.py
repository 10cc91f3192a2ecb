"""`trace`: a model as a torch.fx graph that shares its modules, or the reason why it is none.

A trace follows one way through the model's code. Where Python chooses another way by anything that
the trace does not see, the graph would be another function: so tracing is refused for models that
change their own state, and for those that ask for types, modes or the environment.
"""

from __future__ import annotations

import copy
import dis
import inspect
import operator
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from spartan.deploy.inference_layers import InferenceLayer
from spartan.deploy.running_state import changed_since, state_of
from spartan.errors import DeployError
from spartan.example_inputs import run_on

_CONSTANTS = (int, float, complex, str, bytes, torch.dtype, torch.device, types.UnionType)
_PLAIN = (bool, int, float, str)
_NOT_THE_MODEL = {"torch", *sys.stdlib_module_names} - {"__main__"}
# By what a function asks for what a trace answers otherwise: types, modes, the environment.
_QUESTIONS = {
    *("isinstance", "issubclass", "type", "hasattr", "callable", "is_tensor", "__class__"),
    *("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "requires_grad"),
    *("environ", "getenv"),
}
_MATCH_CLASS = dis.opmap.get("MATCH_CLASS", -1)  # of `case torch.Tensor():`


class _Proxy(fx.Proxy):
    """Records `x += y` as what it is; by itself torch.fx takes it for `x = x + y`."""

    def _change(self, function: Any, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __len__(self) -> int:
        pieces = _pieces(self.node)
        return super().__len__() if pieces is None else pieces


def _in_place(function: Any) -> Any:
    def change(self: _Proxy, other: Any) -> fx.Proxy:
        return self._change(function, other)

    return change


for _name in (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor"),
):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Take the pieces of `chunk` apart."""
        pieces = _pieces(obj.node)
        if pieces is None:
            return super().iter(obj)
        return iter([obj[i] for i in range(pieces)])  # type: ignore[index]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, InferenceLayer) or super().is_leaf_module(m, module_qualified_name)


def _pieces(node: fx.Node) -> int | None:
    """Return how many tensors a node returns, if it is a `chunk` and its call says it."""
    if node.op not in ("call_method", "call_function") or node.target not in ("chunk", torch.chunk):
        return None
    pieces = node.kwargs.get("chunks", node.args[1] if len(node.args) > 1 else None)
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    # Of a batch there may be fewer.
    return pieces if isinstance(pieces, int) and dim != 0 else None


def trace(model: nn.Module, example_input: Any) -> fx.GraphModule:
    """Return the model as a graph that shares its modules.

    Args:
        model: In evaluation mode; its state may be changed if it is refused.
        example_input: Arguments that it does not give keep their defaults. None: those that have a
            default keep it, and no shapes are noted.

    Raises:
        DeployError: It cannot be traced; the message says why.
    """
    left_out = arguments_left_out(model, example_input)
    _refuse_replaced_forwards(model)
    before = state_of(model)
    asked: set[str] = set()
    try:
        with _Watching(asked):
            graph = _Tracer().trace(model, concrete_args=left_out or None)
        for node in reversed(graph.nodes):
            node.type = None  # annotations that are kept as text cannot be pickled
            _keep_defaults(node, left_out)
        traced = fx.GraphModule(model, graph, type(model).__name__)
        if example_input is not None:
            _Shapes(traced).note(example_input)
    except Exception as error:
        # Tracing runs the user's code on stand-ins: whatever it raises, it cannot be traced.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DeployError(f"torch.fx cannot trace it: {reason}") from error
    finally:
        constants = [name for name in vars(model) if name.startswith("_tensor_constant")]
        for name in constants:
            delattr(model, name)  # the tracer put it there
    if constants:
        raise DeployError("it makes a tensor in its forward pass, which a trace would make once")
    changed = changed_since(before, model)
    if changed:
        raise DeployError(f"it changes {changed!r} when it runs")
    if asked:
        raise DeployError(
            f"{min(asked)} asks for a type, a mode, the environment or a global variable, which a "
            "trace answers once and for all, and for stand-ins"
        )
    return traced


class _Watching:
    """Notes which functions outside of torch ask what a trace cannot answer, while they run.

    Global variables are among that, but for modules, functions and classes.
    """

    def __init__(self, asked: set[str]) -> None:
        self._asked = asked
        self._seen: set[CodeType] = set()
        self._before: Callable[..., Any] | None = None

    def __enter__(self) -> None:
        self._before = sys.getprofile()
        sys.setprofile(self._note)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or code in self._seen:
            return
        self._seen.add(code)
        module = str(frame.f_globals.get("__name__", ""))
        if code.co_qualname.startswith("singledispatch"):
            self._asked.add(f"functools.{code.co_qualname}")
        if module.partition(".")[0] in _NOT_THE_MODEL or module == __name__:
            return
        if code.co_name in ("__getattribute__", "__getattr__"):
            return  # the tracer looks through all attributes of the model
        read = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
        variable = any(_is_variable(frame.f_globals.get(name)) for name in read)
        if _QUESTIONS & set(code.co_names) or variable or _MATCH_CLASS in code.co_code[::2]:
            self._asked.add(f"{module}.{code.co_qualname}")


def _is_variable(value: Any) -> bool:
    """Whether a global is one that programs change: not code, and no number or text."""
    code = (ModuleType, FunctionType, BuiltinFunctionType, type, types.GenericAlias)
    return value is not None and not callable(value) and not isinstance(value, (*code, *_CONSTANTS))


def _refuse_replaced_forwards(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if "forward" in vars(module) and name:
            raise DeployError(f"the forward of {name!r} was replaced")
        if (module._forward_hooks or module._forward_pre_hooks) and next(module.children(), None):
            raise DeployError(f"{name or 'the model'!r} has hooks, which a graph would not run")


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
            "traced without it: give an example that has it."
        )
    return None


def arguments_left_out(model: nn.Module, example_input: Any) -> dict[str, Any]:
    """Return the arguments that an example input leaves out, with their defaults.

    Raises:
        DeployError: They rule out tracing: torch.fx takes plain values only.
    """
    parameters = inspect.signature(type(model).forward).parameters
    names = list(parameters)[1:]
    if example_input is None:
        given = {name for name in names if parameters[name].default is inspect.Parameter.empty}
    elif isinstance(example_input, Mapping):
        given = set(example_input)
    else:
        given = set(names[: len(example_input) if isinstance(example_input, tuple | list) else 1])
    for name in names:
        if parameters[name].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            raise DeployError(f"torch.fx cannot trace a forward with {parameters[name]}")
    left_out = {name: parameters[name].default for name in names if name not in given}
    for name, value in left_out.items():
        if value is not None and type(value) not in _PLAIN:
            raise DeployError(f"the argument {name!r} is left out, and its default is no constant")
    return left_out


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
