"""A frozen backbone with adapters, used as PEFT's models are."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from types import CodeType
from typing import Any, ClassVar, Self

import torch
from torch import nn

from spartan.adapters.adapter import Adapter
from spartan.adapters.attachment import Attachment, is_adapted
from spartan.adapters.base import AdapterConfig
from spartan.adapters.files import read_adapter, write_adapter
from spartan.errors import AdapterError, did_you_mean


class AdapterModel(nn.Module):
    """A backbone whose own weights are frozen, and its adapters, of which one is active.

    Its state dict holds the adapters only: what a trainer's checkpoint has to.

    Calls, attributes and methods that it does not have itself (`generate`, `config`,
    `gradient_checkpointing_enable`, …) are the backbone's. The backbone is used in place: while an
    adapter is active, calling it directly computes the same.

    Attributes:
        base_model: The backbone. Its parameters and the keys of its state never change.
        adapters: The adapters by name.
    """

    config_class: ClassVar[type[AdapterConfig]] = AdapterConfig

    def __init__(self, base: nn.Module, config: AdapterConfig, adapter_name: str = "default"):
        """Freeze a backbone and add a first adapter, which is active and trainable.

        Raises:
            AdapterError: The adapter does not fit the backbone; the backbone is untouched then.
        """
        super().__init__()
        if isinstance(base, AdapterModel) or is_adapted(base):
            raise AdapterError(
                "The model has adapters already: call add_adapter() on it, or unload() it first."
            )
        adapter = self._create(base, config)
        self.training = base.training
        self.base_model = base
        self.adapters = nn.ModuleDict().train(base.training)
        self._required = {name: p.requires_grad for name, p in base.named_parameters()}
        self._active: str | None = None
        self._attachment: Attachment | None = None
        # What transformers' Trainer looks at to see which columns the model takes.
        self.forward = _Forward(self, base)  # type: ignore[method-assign]
        self._add(adapter_name, adapter)
        self.register_state_dict_post_hook(_leave_backbone_out)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_miss_no_backbone)  # type: ignore[no-untyped-call]
        base.requires_grad_(False)
        self.set_adapter(adapter_name)

    @classmethod
    def from_pretrained(
        cls,
        base: nn.Module,
        folder: str | PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> Self:
        """Put a saved adapter on a backbone.

        Args:
            base: The backbone it was made for.
            folder: Where `save_pretrained` wrote it.
            adapter_name: Its name here.
            is_trainable: Whether it is to be trained further.

        Raises:
            FileError: The folder holds no adapter, or it is damaged.
            AdapterError: It was made for another kind of model.
        """
        config, tensors = read_adapter(Path(folder), base)
        with torch.random.fork_rng(devices=[]):
            model = cls(base, config, adapter_name)
        try:
            model.adapters[adapter_name].load(tensors)  # type: ignore[operator]
        except AdapterError:
            model.unload()
            raise
        model.set_adapter(adapter_name, is_trainable)
        return model

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """Call the backbone with the active adapter; arguments and result are the backbone's."""
        if labels is not None:
            # Spelled out for transformers' Trainer, which looks for such names in the class.
            kwargs["labels"] = labels
            self._refuse_to_train_nothing()
        # Compiled code does not notice that hooks change. It does notice what branches depend on.
        model = self.base_model if self._active else self.get_base_model()
        return model(*args, **kwargs)

    def add_adapter(self, adapter_name: str, config: AdapterConfig) -> None:
        """Add a new adapter, without making it active.

        Raises:
            AdapterError: The name is taken or unsuitable, or the adapter does not fit.
        """
        self._refuse_name(adapter_name)
        with self.disable_adapter():  # its copies are of the backbone's own modules
            adapter = self._create(self.base_model, config)
        self._add(adapter_name, adapter)

    def load_adapter(
        self, folder: str | PathLike[str], adapter_name: str, is_trainable: bool = False
    ) -> None:
        """Add a saved adapter, without making it active.

        Raises:
            FileError: The folder holds no adapter, or it is damaged.
            AdapterError: The name is taken or unsuitable, or the adapter does not fit.
        """
        self._refuse_name(adapter_name)
        config, tensors = read_adapter(Path(folder), self.base_model)
        with self.disable_adapter(), torch.random.fork_rng(devices=[]):
            adapter = self._create(self.base_model, config)
        adapter.load(tensors)
        self._add(adapter_name, adapter)
        adapter.trainable = is_trainable

    def set_adapter(self, adapter_name: str, is_trainable: bool | None = None) -> None:
        """Make one adapter active, the only one that is used and trained.

        Args:
            adapter_name: Its name.
            is_trainable: Whether it is to be trained; by default as it was.

        Raises:
            AdapterError: There is none of this name.
        """
        adapter = self._get(adapter_name)
        if is_trainable is not None:
            adapter.trainable = is_trainable
        self._detach()
        for name, other in self.adapters.items():
            other.requires_grad_(name == adapter_name and adapter.trainable)
        self._attachment = adapter.attach(self.base_model)
        self._active = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; of the others, the first becomes active if this one was.

        Raises:
            AdapterError: There is none of this name, or no other one.
        """
        self._get(adapter_name)
        if len(self.adapters) == 1:
            raise AdapterError(
                f"{adapter_name!r} is the only adapter: unload() gives the backbone back."
            )
        active = self._active
        if active == adapter_name:
            self._detach()
        del self.adapters[adapter_name]
        if active == adapter_name:
            self.set_adapter(next(iter(self.adapters)))

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute exactly what the backbone does, for the length of a with block."""
        active = self._active
        self._detach()
        try:
            yield
        finally:
            if active is not None and self._active is None:  # else another was set meanwhile
                left = active if active in self.adapters else next(iter(self.adapters))
                self.set_adapter(left)

    def unload(self) -> nn.Module:
        """Take everything off and return the backbone as it was."""
        self._detach()
        for name, parameter in self.base_model.named_parameters():
            parameter.requires_grad_(self._required.get(name, True))
        return self.base_model

    def merge_and_unload(self) -> nn.Module:
        """Write the active adapter into the backbone's weights, where that is possible.

        Raises:
            AdapterError: It computes what no weights can express, as a memory does, or a weight is
                tied to one that it leaves alone.
        """
        adapter = self._active_adapter()
        with self.disable_adapter():
            adapter.merge(self.base_model)
        return self.unload()

    def save_pretrained(self, folder: str | PathLike[str], **ignored: Any) -> None:
        """Write the active adapter: `adapter_config.json` and `adapter_model.safetensors`.

        Args:
            folder: Made if it is not there.
            ignored: What trainers pass to the method of this name of other models.

        Raises:
            FileError: It cannot be written.
            AdapterError: None is active.
        """
        write_adapter(Path(folder), self._active_adapter(), self.base_model)

    def get_base_model(self) -> nn.Module:
        """Return the backbone."""
        return self.base_model

    @property
    def active_adapters(self) -> list[str]:
        """Name of the active adapter; empty while it is disabled."""
        return [] if self._active is None else [self._active]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trainable parameters, and of all: backbone and active adapter."""
        own = list(self._active_adapter().parameters()) if self._active else []
        trainable = sum(p.numel() for p in own if p.requires_grad)
        return trainable, sum(p.numel() for p in self.base_model.parameters()) + sum(
            p.numel() for p in own
        )

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained."""
        trainable, total = self.get_nb_trainable_parameters()
        print(  # noqa: T201
            f"trainable params: {trainable:,} || all params: {total:,} || "
            f"trainable: {trainable / total:.4%}"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(super().__getattr__("base_model"), name)

    def _create(self, base: nn.Module, config: AdapterConfig) -> Adapter:
        if not isinstance(config, self.config_class):
            raise AdapterError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, not a "
                f"{type(config).__name__}; AdapterModel takes every kind."
            )
        return Adapter(base, config)

    def _refuse_name(self, name: str) -> None:
        if name in self.adapters:
            raise AdapterError(
                f"There is an adapter {name!r} already; choose another name or delete_adapter() it."
            )
        if not name or "." in name or hasattr(self.adapters, name):
            raise AdapterError(
                f"{name!r} cannot be an adapter's name: it may not be empty, have a dot, or be an "
                "attribute of torch's ModuleDict."
            )

    def _refuse_to_train_nothing(self) -> None:
        if self.training and torch.is_grad_enabled() and self._active:
            adapter = self._get(self._active)
            if not adapter.trainable:
                raise AdapterError(
                    f"The adapter {self._active!r} is not to be trained: load it with "
                    "is_trainable=True, or set_adapter(name, is_trainable=True); eval() otherwise."
                )

    def _add(self, name: str, adapter: Adapter) -> None:
        self._refuse_name(name)
        adapter.requires_grad_(False)
        adapter.train(self.training)
        self.adapters[name] = adapter

    def _get(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise AdapterError(f"There is no adapter {name!r}; {did_you_mean(name, self.adapters)}")
        return self.adapters[name]  # type: ignore[return-value]

    def _active_adapter(self) -> Adapter:
        if self._active is None:
            raise AdapterError("No adapter is active: set_adapter() makes one.")
        return self._get(self._active)

    def _detach(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment, self._active = None, None


def _leave_backbone_out(
    model: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}base_model.")]:
        del state[key]


def _miss_no_backbone(model: AdapterModel, incompatible: Any) -> None:
    own = {f"base_model.{key}" for key in model.base_model.state_dict()}
    missing: list[str] = incompatible.missing_keys
    missing[:] = [key for key in missing if not any(key.endswith(name) for name in own)]


class _Forward:
    """`forward` of a model, with the signature of its backbone's."""

    def __init__(self, model: AdapterModel, base: nn.Module) -> None:
        self.model = model
        self.__signature__ = inspect.signature(base.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.model).forward(self.model, *args, **kwargs)

    @property
    def __code__(self) -> CodeType:
        # torch.export says where the forward pass is from.
        return type(self.model).forward.__code__
