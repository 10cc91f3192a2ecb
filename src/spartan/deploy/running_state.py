"""What a model changes of itself when it runs: `state_of` before, `changed_since` after."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from spartan.deploy.inference_layers import InferenceLayer
from spartan.deploy.sparse_operators import version_of

_PLAIN = (bool, int, float, str, bytes, complex)
# What every module has; its own attributes are the others. Whether it trains is one of those.
MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return all attributes, parameters and buffers by name, as they are now.

    Tensors are held with a count of their writes; lists, dicts, sets and plain objects with what is
    in them.
    """
    return dict(_facts(model))


def changed_since(before: dict[str, Any], model: nn.Module) -> str:
    """Return the name of something that is another than it was; empty if all is the same."""
    now = state_of(model)
    for name in before.keys() | now.keys():
        if not _same(before.get(name, _GONE), now.get(name, _GONE)):
            return name
    return ""


_GONE = object()


def _facts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            yield f"{dot}{name}", _fact(tensor)
        if isinstance(module, InferenceLayer):
            continue  # what it prepares for each size of input is no state
        for name, value in vars(module).items():
            if name not in MODULE_ATTRIBUTES:
                yield f"{dot}{name}", _fact(value)


def _fact(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value, version_of(value)
    if isinstance(value, dict):
        return value, tuple(value.keys()), tuple(value.values())
    if isinstance(value, list | set):
        return value, tuple(value)
    return (value, tuple(vars(value).items())) if is_plain(value) else value


def is_plain(value: Any) -> bool:
    """Whether a value is an object of attributes, as configurations are."""
    apart = (type, nn.Module, Tensor, FunctionType, MethodType, ModuleType)
    return hasattr(value, "__dict__") and not isinstance(value, apart)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and isinstance(a, _PLAIN) and bool(a == b)
