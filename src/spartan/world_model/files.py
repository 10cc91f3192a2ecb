"""World models on disk: one safetensors file each, with their configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from spartan.errors import FileError, SpartanError
from spartan.files import load_tensors, save_tensors
from spartan.world_model.baselines import GlobalGraph, NearestObjects
from spartan.world_model.model import TransitionConfig, TransitionModel, WorldModel

_FEW_LAYERS = 100  # that no file needs to have tensors for: one baseline has none of its layers


def save_model(path: Path, model: WorldModel) -> None:
    """Write a model and what it takes to build it again.

    Raises:
        FileError: The file cannot be written.
    """
    facts: dict[str, Any] = {
        "world_model": type(model).__name__,
        "config": dataclasses.asdict(model.config),
    }
    if isinstance(model, GlobalGraph):
        facts["objects"] = len(model.gate_logits)
    if isinstance(model, NearestObjects):
        facts["neighbours"] = model.neighbours
    save_tensors(path, model.state_dict(), facts)


def load_model(path: Path) -> WorldModel:
    """Read what `save_model` wrote, ready to predict.

    Raises:
        FileError: The file is missing, damaged, or holds something else.
    """
    tensors, facts = load_tensors(path)
    try:
        config = TransitionConfig(**facts["config"])
        # Built without memory first: what a file claims to hold may be more than there is.
        if config.layers > max(len(tensors), _FEW_LAYERS):
            raise FileError(f"It claims {config.layers:,} layers, and has {len(tensors)} tensors.")
        with torch.device("meta"):
            claimed = _build(facts, config).state_dict()
        if {k: v.shape for k, v in claimed.items()} != {k: v.shape for k, v in tensors.items()}:
            raise FileError("Its tensors are not those of the model it claims to hold.")
        model = _build(facts, config)
        model.load_state_dict(tensors)
    except (
        *(AttributeError, KeyError, OverflowError, TypeError, ValueError),
        *(RuntimeError, SpartanError),
    ) as error:
        raise FileError(f"{str(path)!r} does not hold a world model.") from error
    return model.eval()


def _build(facts: dict[str, Any], config: TransitionConfig) -> WorldModel:
    """Return a new model of the kind that the facts of a file name."""
    if facts["world_model"] == "GlobalGraph":
        return GlobalGraph(config, facts["objects"])
    if facts["world_model"] == "NearestObjects":
        return NearestObjects(config, facts["neighbours"])
    if facts["world_model"] == "TransitionModel":
        return TransitionModel(config)
    raise FileError(f"It holds an unknown model, {facts['world_model']!r}.")
