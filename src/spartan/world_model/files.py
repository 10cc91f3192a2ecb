"""World models on disk: one safetensors file each, with their configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from spartan.errors import FileError, SpartanError
from spartan.files import load_tensors, save_tensors
from spartan.world_model.baselines import GlobalGraph, NearestObjects
from spartan.world_model.model import TransitionConfig, TransitionModel, WorldModel


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
        model: WorldModel
        if facts["world_model"] == "GlobalGraph":
            model = GlobalGraph(config, facts["objects"])
        elif facts["world_model"] == "NearestObjects":
            model = NearestObjects(config, facts["neighbours"])
        elif facts["world_model"] == "TransitionModel":
            model = TransitionModel(config)
        else:
            raise FileError(f"{str(path)!r} holds an unknown model, {facts['world_model']}.")
        model.load_state_dict(tensors)
    except (AttributeError, KeyError, TypeError, RuntimeError, SpartanError) as error:
        raise FileError(f"{str(path)!r} does not hold a world model.") from error
    return model.eval()
