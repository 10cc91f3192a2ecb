"""`Adapter`: the modules that one adapter trains, saves and merges."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spartan.adapters.attachment import Attachment
from spartan.adapters.base import AdapterConfig, adapter_dtype, is_inside
from spartan.adapters.layers import find_layers
from spartan.errors import AdapterError


class Adapter(nn.Module):
    """What one adapter trains and ships.

    Nothing of it is registered in the backbone: add-ons act through forward hooks, and copies of
    modules that are trained whole stand in for them. So the backbone's parameters and the keys of
    its state never change.

    Attributes:
        config: Its settings.
        paths: Modules of the backbone that add-ons belong to, in the order of `add_ons`.
        add_ons: What is added to their outputs.
        copied: Modules of the backbone that are replaced, in the order of `copies`.
        copies: What stands in for them.
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
        adds = type(config).add_ons is not AdapterConfig.add_ons
        layers = find_layers(base, config.target_layers) if adds else []
        added = list(config.add_ons(layers))
        self.paths = [path for path, _ in added]
        _refuse_what_is_not_called(base, self.paths, self.copied)
        self.add_ons = nn.ModuleList(add_on for _, add_on in added)
        memo: dict[int, Any] = {}  # one for all, so that tied parameters stay tied
        self.copies = nn.ModuleList(
            copy.deepcopy(base.get_submodule(path), memo) for path in self.copied
        )
        for path, add_on in added:
            beside = next(base.get_submodule(path).parameters(), next(base.parameters()))
            add_on.to(beside.device, adapter_dtype(base))
        for parameter in self.copies.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()
        if not any(p.is_floating_point() for p in self.parameters()):
            raise AdapterError(
                f"The {config.name} adapter has nothing to train: no module is added, and "
                "modules_to_save is empty."
            )

    def attach(self, base: nn.Module) -> Attachment:
        """Put it on a backbone; `Attachment.remove` takes it off."""
        add_ons = dict(zip(self.paths, self.add_ons, strict=True))
        return Attachment(base, add_ons, dict(zip(self.copied, self.copies, strict=True)))

    def named_tensors(self) -> dict[str, Tensor]:
        """Return what is trained or saved under names of the backbone: `PATH.memory.keys`, say.

        Tied tensors appear once.
        """
        named: dict[str, Tensor] = {}
        for path, add_on in zip(self.paths, self.add_ons, strict=True):
            for name, tensor in add_on.state_dict(keep_vars=True).items():
                named[f"{path}.{self.config.name}.{name}"] = tensor
        for path, module in zip(self.copied, self.copies, strict=True):
            for name, tensor in module.state_dict(keep_vars=True).items():
                named[f"{path}.{name}".lstrip(".")] = tensor
        first = {id(tensor): name for name, tensor in reversed(named.items())}
        return {name: tensor for name, tensor in named.items() if first[id(tensor)] == name}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of saved tensors.

        Raises:
            AdapterError: Names or shapes differ; nothing has been changed then.
        """
        own = self.named_tensors()
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
            AdapterError: It computes what weights cannot express, or a weight is tied to one that
                it leaves alone; nothing has been changed then.
        """
        for add_on in self.add_ons:
            if not add_on.mergeable:
                raise AdapterError(
                    f"A {type(add_on).__name__} depends on its input in a way that no weight of "
                    "the backbone can express, so it cannot be merged. Keep it, or unload() it."
                )
        _refuse_tied(base, self.paths, self.copied)
        for path, add_on in zip(self.paths, self.add_ons, strict=True):
            add_on.merge(base.get_submodule(path))  # type: ignore[operator]
        for path, module in zip(self.copied, self.copies, strict=True):
            base.get_submodule(path).load_state_dict(module.state_dict())


def _refuse_what_is_not_called(
    base: nn.Module, added: Sequence[str], copied: Sequence[str]
) -> None:
    """Refuse modules whose output is never asked for, and what is added twice."""
    for path in added:
        outer = next((outer for outer in copied if path != outer and is_inside(path, outer)), None)
        if outer is not None:
            raise AdapterError(
                f"modules_to_save trains {outer!r} whole, but {path!r} inside it is to be changed "
                "by an add-on. Name smaller modules, or choose other target_layers."
            )
        if added.count(path) > 1:
            raise AdapterError(f"target_layers overlap: {path!r} is in several of them.")
    for path in (*added, *copied):
        parent = base.get_submodule(path.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise AdapterError(
                f"torch's attention reads the weights of {path!r} without calling it: choose "
                f"{path.rpartition('.')[0]!r}."
            )


def _refuse_tied(base: nn.Module, added: Sequence[str], copied: Sequence[str]) -> None:
    """Refuse to write weights that modules which are to stay share."""
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        changed = [n for n in tied if any(is_inside(n, path) for path in (*added, *copied))]
        whole = all(any(is_inside(n, path) for path in copied) for n in tied)
        if changed and len(tied) > 1 and not whole:
            others = ", ".join(n for n in tied if n != changed[0])
            raise AdapterError(
                f"{changed[0]!r} is tied to {others}: merging would change both. Keep the adapter, "
                "or untie them first."
            )
