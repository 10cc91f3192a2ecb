"""Adapters on disk: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spartan.adapters.adapter import Adapter
from spartan.adapters.base import AdapterConfig, config_from
from spartan.adapters.registry import ADAPTERS
from spartan.errors import AdapterError, FileError
from spartan.files import load_tensors, save_tensors, write_text

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_VERSION = 1
_SMALL = 1024  # settings up to this may be larger than all tensors together


def write_adapter(folder: Path, adapter: Adapter, base: nn.Module) -> None:
    """Write an adapter's tensors and settings.

    Raises:
        FileError: They cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"Cannot make the folder {str(folder)!r}: {error.strerror}.") from error
    values = {"version": _VERSION, "base": _about(base), "adapter": adapter.config.to_dict()}
    text = json.dumps(values, indent=2) + "\n"
    # The settings are in both files, so that two halves of different adapters are noticed.
    save_tensors(folder / TENSORS, adapter.named_tensors(), values)
    write_text(folder / CONFIG, text)


def read_adapter(folder: Path, base: nn.Module) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read an adapter that was made for this kind of backbone.

    Raises:
        FileError: The folder holds none, or it is damaged.
        AdapterError: It was made for another model type or width, or a setting is wrong.
    """
    if not (folder / CONFIG).is_file():
        raise FileError(
            f"{str(folder)!r} holds no adapter: there is no {CONFIG}. save_pretrained() writes one."
        )
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        version, about, settings = (values[key] for key in ("version", "base", "adapter"))
        made_for = about["type"], about["hidden_size"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(
            f"{str(folder / CONFIG)!r} is damaged, or an adapter of another library."
        ) from error
    if version != _VERSION:
        raise FileError(
            f"{str(folder)!r} has version {version!r}; this version of spartan reads {_VERSION}."
        )
    here = _about(base)
    if made_for != (here["type"], here["hidden_size"]):
        raise AdapterError(
            f"The adapter in {str(folder)!r} was made for {_words(about)}; this model is "
            f"{_words(here)}."
        )
    config = config_from(settings, ADAPTERS)
    tensors, written_with = load_tensors(folder / TENSORS)
    if written_with != values:
        raise FileError(
            f"{str(folder)!r} holds the settings of one adapter and the tensors of another: they "
            "were not written together."
        )
    # Before anything is made of this size: each size of an adapter is that of some tensor of it.
    entries = sum(tensor.numel() for tensor in tensors.values())
    for name, value in settings.items():
        if isinstance(value, int) and value > max(entries, _SMALL):
            raise FileError(
                f"{str(folder)!r} is damaged: {name}={value:.3g}, and its tensors hold "
                f"{entries:,} numbers."
            )
    return config, tensors


def _about(base: nn.Module) -> dict[str, Any]:
    config = getattr(base, "config", None)
    kind = getattr(config, "model_type", None) or type(base).__name__
    size = getattr(config, "hidden_size", None)
    return {"type": str(kind), "hidden_size": size if isinstance(size, int) else None}


def _words(about: dict[str, Any]) -> str:
    size = about["hidden_size"]
    return f"{about['type']!r}" + (f" of width {size}" if size else "")
