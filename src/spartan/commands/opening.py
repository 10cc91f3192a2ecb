"""`open_model`: loads a model for a command, from a run folder or by name and weights file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from spartan.commands.models import build_model, require_trusted
from spartan.commands.runs.facts import read_facts
from spartan.commands.runs.folder import Run
from spartan.deploy.loading import load
from spartan.errors import ConfigError, StateError


def open_model(
    source: str,
    weights: Path | None,
    shape: Sequence[int] | None,
    classes: int,
    trust: bool = False,
) -> tuple[nn.Module, tuple[int, ...]]:
    """Make a model and load its weights.

    Args:
        source: A run folder, or the name of a model as in `spartan train --model`.
        weights: A safetensors file, packed or not; a run's own weights by default.
        shape: Of an input, batch first; one image by default, where a run says how large.
        classes: For a model by name.
        trust: Whether a run folder may name any function as its model, which is called.

    Returns:
        The model in evaluation mode, and the shape of an input.

    Raises:
        ConfigError: The model cannot be made, or its input is not known.
        FileError: A file is missing or damaged.
        DeployError: The weights are not of this model.
    """
    if (Path(source) / "config.json").is_file():
        run = Run.open(Path(source))
        facts = read_facts(run)
        if not facts.images:
            raise ConfigError(
                f"{source!r} was not calibrated with images, so its input is unknown."
            )
        channels, size = facts.images["channels"], facts.images["size"]
        names = facts.images["classes"]
        require_trusted(run.config().model, source, trust)
        model = build_model(run.config().model, channels, size, len(names))
        if weights is None:
            try:
                model.load_state_dict(facts.tensors)
            except RuntimeError as error:
                raise StateError(f"The saved weights do not fit the model: {error}") from error
        shape = shape or (1, channels, size, size)
    elif shape is None:
        raise ConfigError(
            f"{source!r} is not a run folder, so --input must say what the model takes, like "
            "1x3x32x32."
        )
    else:
        model = build_model(source, shape[1] if len(shape) > 1 else 1, shape[-1], classes)
    if weights is not None:
        load(weights, model)
    return model.eval(), tuple(shape)
