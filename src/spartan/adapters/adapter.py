"""One adapter: its modules, and how they are put on a backbone and taken off again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spartan.adapters.base import AdapterConfig, AddOn, adapter_dtype
from spartan.adapters.layers import find_layers
from spartan.errors import AdapterError


class Adapter(nn.Module):
    """What one adapter trains and ships.

    Nothing of it is registered in the backbone: add-ons act through forward hooks, and modules that
    are trained whole lend their `forward` to the modules they are copies of. So the backbone's
    parameters, buffers and the keys of its state never change.

    Attributes:
        config: Its settings.
        paths: Modules of the backbone that add-ons belong to, in the order of `add_ons`.
        add_ons: What is added to their outputs.
        copied: Modules of the backbone that are replaced, in the order of `copies`.
        copies: What is used instead of them.
        trainable: Whether it is trained when it is active.
    """

    def __init__(self, base: nn.Module, config: AdapterConfig) -> None:
        """Create an adapter for a backbone, which is not changed.

        Raises:
            AdapterError: It does not fit, or there is nothing it would train.
        """
        super().__init__()
        self.config = config
        self.trainable = True
        self.copied = config.copied(base)
        memo: dict[int, Any] = {}  # one for all, so that tied parameters stay tied
        self.copies = nn.ModuleList(
            copy.deepcopy(base.get_submodule(path), memo) for path in self.copied
        )
        layers = find_layers(base, config.target_layers) if _adds(config) else []
        added = list(config.add_ons(layers))
        _refuse_hidden([path for path, _ in added], self.copied)
        self.paths = [path for path, _ in added]
        self.add_ons = nn.ModuleList(add_on for _, add_on in added)
        for path, add_on in added:
            _move_beside(add_on, base.get_submodule(path), base)
        for module in self.copies:
            for parameter in module.parameters():
                if parameter.dtype in (torch.float16, torch.bfloat16):
                    parameter.data = parameter.data.float()
        if not any(p.is_floating_point() for p in self.parameters()):
            raise AdapterError(
                f"The {config.name} adapter has nothing to train: no module is added, and "
                "modules_to_save is empty."
            )

    def attach(self, base: nn.Module) -> Attachment:
        """Put it on a backbone; `Attachment.remove` takes it off."""
        return Attachment(self, base)

    def named_tensors(self) -> Iterator[tuple[str, nn.Parameter | Tensor]]:
        """Yield what is trained or saved under names of the backbone: `PATH.memory.keys`, say."""
        for path, add_on in zip(self.paths, self.add_ons, strict=True):
            for name, tensor in add_on.state_dict(keep_vars=True).items():
                yield f"{path}.{self.config.name}.{name}", tensor
        for path, module in zip(self.copied, self.copies, strict=True):
            for name, tensor in module.state_dict(keep_vars=True).items():
                yield f"{path}.{name}".lstrip("."), tensor

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of saved tensors.

        Raises:
            AdapterError: Names or shapes differ; nothing has been changed then.
        """
        own = dict(self.named_tensors())
        for name in sorted(own.keys() ^ tensors.keys()):
            where = "the file lacks" if name in own else "the model has no place for"
            raise AdapterError(
                f"The saved adapter does not fit this model: {where} {name!r} "
                f"({len(tensors)} tensors in the file, {len(own)} expected)."
            )
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise AdapterError(
                    f"The saved adapter does not fit this model: {name!r} is "
                    f"{tuple(tensors[name].shape)} in the file, {tuple(tensor.shape)} here."
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def merge(self, base: nn.Module) -> None:
        """Write it into the weights of the backbone.

        Raises:
            AdapterError: It computes what weights cannot express; nothing has been changed then.
        """
        for add_on in self.add_ons:
            if isinstance(add_on, AddOn) and type(add_on).merge is AddOn.merge:
                add_on.merge(base)
        for path, add_on in zip(self.paths, self.add_ons, strict=True):
            add_on.merge(base.get_submodule(path))  # type: ignore[operator]
        for path, module in zip(self.copied, self.copies, strict=True):
            base.get_submodule(path).load_state_dict(module.state_dict())


class Attachment:
    """An adapter on a backbone. A class of plain attributes, so that models can be copied."""

    def __init__(self, adapter: Adapter, base: nn.Module) -> None:
        self._handles: list[RemovableHandle] = []
        self._lent: list[nn.Module] = []
        encoders = [m for m in base.modules() if isinstance(m, nn.TransformerEncoder)]
        self._nesting = [m for m in encoders if m.use_nested_tensor]
        # Nested tensors and torch's fused layers go past the modules inside.
        for encoder in self._nesting:
            encoder.use_nested_tensor = False
        for path, module in zip(adapter.copied, adapter.copies, strict=True):
            original = base.get_submodule(path)
            original.forward = module.forward
            self._lent.append(original)
            self._handles.append(original.register_forward_hook(_no_change))
        for path, add_on in zip(adapter.paths, adapter.add_ons, strict=True):
            # First of the hooks, so that others (of transformers, which records hidden states) see
            # what the next layer gets.
            self._handles.append(
                base.get_submodule(path).register_forward_hook(
                    _Change(add_on), prepend=True, with_kwargs=True
                )
            )

    def remove(self) -> None:
        """Take the adapter off."""
        for handle in self._handles:
            handle.remove()
        for module in self._lent:
            del module.forward
        for encoder in self._nesting:
            encoder.use_nested_tensor = True
        self._handles, self._lent, self._nesting = [], [], []


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


def _no_change(module: nn.Module, args: Any, output: Any) -> None:
    """Keep torch's fused layers, which look for hooks, from going past a replaced module."""


def is_adapted(base: nn.Module) -> bool:
    """Whether adapters are on a model."""
    hooks = (hook for module in base.modules() for hook in module._forward_hooks.values())
    return any(isinstance(hook, _Change) or hook is _no_change for hook in hooks)


def _refuse_hidden(added: Sequence[str], copied: Sequence[str]) -> None:
    """Refuse copies of modules inside which something is added: it would not be called."""
    for outer in copied:
        inside = [path for path in added if path.startswith(f"{outer}.")]
        if inside:
            raise AdapterError(
                f"modules_to_save trains {outer!r} whole, but {inside[0]!r} inside it is to be "
                "changed by an add-on. Name smaller modules, or choose other target_layers."
            )


def _adds(config: AdapterConfig) -> bool:
    return type(config).add_ons is not AdapterConfig.add_ons


def _move_beside(add_on: nn.Module, module: nn.Module, base: nn.Module) -> None:
    """Move an add-on to the device of a module, in the dtype it is to be trained in."""
    beside = next(module.parameters(), next(base.parameters(), None))
    device = beside.device if beside is not None else None
    add_on.to(device, adapter_dtype(base))
