"""`FastPath`: stands in for a model's forward, and takes the fused graph where that is the same.

A graph follows the way that the model took on one input. A model with a fast path keeps its class,
attributes and code; calls with the arguments of the example go through the graph while everything
is as it was when it was traced, and all other calls through the model's own code. Both run the same
layers, so there is one set of weights.
"""

from __future__ import annotations

import copy
import inspect
import operator
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from spartan.deploy.comparison import TOLERANCE, relative_error
from spartan.deploy.fusing import FusedLayer, fuse
from spartan.deploy.graph import trace
from spartan.deploy.running_state import MODULE_ATTRIBUTES, is_plain
from spartan.errors import DeployError


def add_fast_path(model: nn.Module, example_input: Any) -> None:
    """Let a model run through its fused graph, where its arguments are those of the example.

    Raises:
        DeployError: It cannot be traced; it stays as it is. The message says why.
    """
    if "forward" in vars(model):
        raise DeployError("its forward was replaced")
    path = FastPath(model)
    path.take_arguments_of(example_input)
    model.forward = path  # before the guard looks at the model
    try:
        path.build_for(example_input)
    except DeployError:
        del model.forward
        raise


class FastPath:
    """The forward of a model that has a graph; see the module's description.

    A copy or pickle has no graph: it is traced again, and compared, when it is first called while
    no other thread runs.

    Args:
        model: In evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kinds: dict[str, Any] = {}  # of the arguments that the graph takes
        self._signature = inspect.signature(type(model).forward)
        self._lock = threading.Lock()
        self._names = tuple(self._signature.parameters)[1:]
        self.layers: list[FusedLayer] = []
        self._graph: fx.GraphModule | None = None
        self._guard: _Guard | None = None
        self._refused = False

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's own forward."""
        parameters = list(self._signature.parameters.values())
        return self._signature.replace(parameters=parameters[1:])

    @property
    def __code__(self) -> CodeType:
        """That of the model's own forward; torch.export names its file."""
        return type(self._model).forward.__code__

    @property
    def graph(self) -> fx.GraphModule | None:
        """The fused graph, if it was made yet."""
        return self._graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        given = None if self._refused or _recording() else self.given_in(args, kwargs)
        if given is not None:
            if self._graph is None:
                self._try_to_build(given)
            if self._graph is not None and self._guard is not None and self._guard.holds():
                return self._graph.forward(**given)
        return type(self._model).forward(self._model, *args, **kwargs)

    def take_arguments_of(self, example_input: Any) -> None:
        """Take the graph for calls with these arguments."""
        args, kwargs = _call_of(example_input)
        bound = self._signature.bind(self._model, *args, **kwargs).arguments
        self._kinds = {name: _kind(value) for name, value in list(bound.items())[1:]}

    def given_in(self, args: Any, kwargs: Any) -> dict[str, Any] | None:
        """Return the arguments for the graph; None if the call has others."""
        if len(args) > len(self._names):
            return None  # the model itself says what is wrong
        given = dict(zip(self._names, args, strict=False))
        for name, value in kwargs.items():
            if name in given or name not in self._names:
                return None
            given[name] = value
        for name in list(given):
            if name not in self._kinds:
                default = self._signature.parameters[name].default
                if given.pop(name) is not default:
                    return None
            elif _kind(given[name]) != self._kinds[name]:
                return None
        if torch.is_grad_enabled() and any(map(_wants_gradient, given.values())):
            return None  # the model may know what to do about it
        return given if len(given) == len(self._kinds) else None

    def build_for(self, example_input: Any) -> None:
        """Trace and fuse, for the arguments of an example.

        Raises:
            DeployError: As `build` does, or the arguments have no names.
        """
        given = self.given_in(*_call_of(example_input))
        if given is None:
            raise DeployError("the arguments of its forward have no names")
        self.build(given)

    def build(self, given: dict[str, Any]) -> None:
        """Trace and fuse.

        Raises:
            DeployError: The model cannot be traced, or the graph computes something else.
        """
        with torch.inference_mode(False), torch.no_grad():
            graph = trace(self._model, given)
            called = fuse(graph)
            expected = type(self._model).forward(self._model, **copy.deepcopy(given))
            result = graph.forward(**copy.deepcopy(given))
        if not _alike(result, expected):
            raise DeployError("its graph returns another type")
        error = relative_error(result, expected)
        if not error <= TOLERANCE:
            raise DeployError(f"its graph computes something else (relative error {error:.1e})")
        self._guard = _Guard(self._model, called)
        self.layers = [call for _, call in called if isinstance(call, FusedLayer)]
        self._graph = graph

    def _try_to_build(self, given: dict[str, Any]) -> None:
        if any(map(_may_run_modules, threading.enumerate())):
            return  # torch.fx patches the calls of all modules while it traces
        with self._lock:
            if self._graph is None and not self._refused:
                try:
                    self.build(given)
                except DeployError:
                    self._refused = True  # its own code is right, if slower

    def __getstate__(self) -> dict[str, Any]:
        nothing: dict[str, Any] = {"_graph": None, "_guard": None, "_lock": None, "layers": []}
        return {**self.__dict__, **nothing, "_signature": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._signature = inspect.signature(type(self._model).forward)


class _Guard:
    """Whether what a trace reads of a model is still the same.

    That is, of all modules but those that the graph calls: children, tensors and attributes, with
    the items of lists and dicts and the attributes of plain objects among them; and the hooks on
    them, on sparse layers, and on all modules, which would not run. Not seen are attributes of
    classes, and what only their contents' contents say.

    Args:
        model: What was traced.
        called: What its graph calls, with names. Modules that sparse layers took over are not.
    """

    def __init__(self, model: nn.Module, called: Sequence[tuple[str, Any]]) -> None:
        entries: list[tuple[dict[Any, Any], Any, Any]] = []
        self._parts: list[dict[Any, Any]] = []
        self._lists: list[list[Any]] = []
        self._hooks: list[dict[int, Any]] = [_global_forward_hooks, _global_forward_pre_hooks]
        for name, module in _apart_from({name for name, _ in called}, model):
            own = vars(module)
            attributes = {
                key: value
                for key, value in own.items()
                if key not in MODULE_ATTRIBUTES and key not in ("plan", "forward")
            }
            contents = [value for value in attributes.values() if isinstance(value, dict)]
            contents += [vars(value) for value in attributes.values() if is_plain(value)]
            self._lists += [value for value in attributes.values() if isinstance(value, list)]
            parts: list[Any] = [module._modules, module._parameters, module._buffers, *contents]
            self._parts += [own, *parts]
            entries += [(own, key, value) for key, value in attributes.items()]
            entries += [(part, key, value) for part in parts for key, value in part.items()]
            if name:
                self._hooks += [module._forward_hooks, module._forward_pre_hooks]
        for _, call in called:
            if isinstance(call, FusedLayer):
                self._hooks += [call.layer._forward_hooks, call.layer._forward_pre_hooks]
        self._sizes = [len(part) for part in self._parts]
        self._dicts = [part for part, _, _ in entries]
        self._keys = [key for _, key, _ in entries]
        self._values = [value for _, _, value in entries]
        self._items = [list(one) for one in self._lists]

    def holds(self) -> bool:
        """Whether the graph still is the model."""
        # In loops that run in C: this is asked at every call.
        same = map(operator.is_, map(dict.get, self._dicts, self._keys), self._values)
        sizes = [*map(len, self._parts)] == self._sizes
        return all(same) and sizes and not any(self._hooks) and self._same_lists()

    def _same_lists(self) -> bool:
        return all(
            len(one) == len(items) and all(map(operator.is_, one, items))
            for one, items in zip(self._lists, self._items, strict=True)
        )


def _apart_from(called: Container[str], model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that are neither called nor inside of one that is."""
    for name, module in model.named_modules():
        parts = name.split(".")
        if not any(".".join(parts[:i]) in called for i in range(1, len(parts) + 1)):
            yield name, module


def _call_of(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if isinstance(example_input, tuple | list):
        return tuple(example_input), {}
    return (example_input,), {}


def _kind(value: Any) -> Any:
    """Return what a graph takes for granted of an argument: of tensors, their dimensions."""
    if isinstance(value, Tensor):
        return value.dim()
    if isinstance(value, Mapping):
        return type(value), tuple(value), tuple(map(_kind, value.values()))
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_kind, value))
    return type(value)


def _may_run_modules(thread: threading.Thread) -> bool:
    return thread is not threading.current_thread() and thread.name != "tqdm_monitor"


def _wants_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _alike(a: Any, b: Any) -> bool:
    """Whether two outputs are nested in the same types."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_alike, a, b))
    return True


def _recording() -> bool:
    """Whether torch is recording a program, which is to have the model's own structure."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
