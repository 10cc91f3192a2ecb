"""Attaches adapter modules to a frozen backbone with hooks, and removes them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from spartan.errors import AdapterError


class Attachment:
    """Add-ons and stand-ins on a backbone.

    Everything that is put on is an object of plain attributes, so that models can be copied.
    """

    def __init__(
        self,
        base: nn.Module,
        add_ons: Mapping[str, nn.Module],
        stand_ins: Mapping[str, nn.Module],
    ) -> None:
        """Put them on.

        Args:
            base: The backbone.
            add_ons: By the path of the module whose output they change.
            stand_ins: By the path of the module they are called instead of.
        """
        self._handles: list[RemovableHandle] = []
        self._forwards: list[tuple[nn.Module, Any]] = []
        encoders = [m for m in base.modules() if isinstance(m, nn.TransformerEncoder)]
        self._nesting = [m for m in encoders if m.use_nested_tensor]
        # Nested tensors and torch's fused layers go past the modules inside.
        for encoder in self._nesting:
            encoder.use_nested_tensor = False
        for path, stand_in in stand_ins.items():
            module = base.get_submodule(path)
            self._forwards.append((module, module.__dict__.get("forward")))
            module.forward = _StandIn(module, stand_in)
            self._handles.append(module.register_forward_hook(_no_change))
        for path, add_on in add_ons.items():
            # First of the hooks, so that others (of transformers, which records hidden states) see
            # what the next layer gets.
            self._handles.append(
                base.get_submodule(path).register_forward_hook(
                    _Change(add_on), prepend=True, with_kwargs=True
                )
            )

    def remove(self) -> None:
        """Take everything off."""
        for handle in self._handles:
            handle.remove()
        for module, before in self._forwards:
            del module.forward
            if before is not None:
                module.forward = before
        for encoder in self._nesting:
            encoder.use_nested_tensor = True
        self._handles, self._forwards, self._nesting = [], [], []


def is_adapted(base: nn.Module) -> bool:
    """Whether adapters are on a model."""
    hooks = (hook for module in base.modules() for hook in module._forward_hooks.values())
    return any(isinstance(hook, _Change) or hook is _no_change for hook in hooks)


class _Change:
    """A forward hook that lets an add-on change the output, or the first part of it."""

    def __init__(self, add_on: nn.Module) -> None:
        self.add_on = add_on

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        inputs = args or tuple(kwargs.values())
        if isinstance(output, Tensor):
            return self.add_on(output, inputs, module)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            changed = (self.add_on(output[0], inputs, module), *output[1:])
            return type(output)(*changed) if hasattr(output, "_fields") else changed
        raise AdapterError(
            f"{type(module).__name__} returns a {type(output).__name__}; adapters can change a "
            "tensor, or the first of a tuple. Choose another module in target_layers."
        )


class _StandIn:
    """A `forward` that calls another module, in that one's precision."""

    def __init__(self, module: nn.Module, stand_in: nn.Module) -> None:
        self.module = module
        self.stand_in = stand_in

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outside, inside = _first(self.module), _first(self.stand_in)
        if outside.dtype == inside.dtype or torch.is_autocast_enabled(inside.device.type):
            return self.stand_in.forward(*args, **kwargs)
        args, kwargs = _to((args, kwargs), inside.dtype)
        return _to(self.stand_in.forward(*args, **kwargs), outside.dtype)


def _first(module: nn.Module) -> Tensor:
    """Return the first floating-point parameter, or else some scalar."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter
    return torch.zeros(())


def _to(values: Any, dtype: torch.dtype) -> Any:
    def convert(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    return tree_map_only(Tensor, convert, values)


def _no_change(module: nn.Module, args: Any, output: Any) -> None:
    """Keep torch's fused layers, which look for hooks, from going past a replaced module."""
