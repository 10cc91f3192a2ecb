"""`find_teacher`: opens the network that `spartan train --teacher` names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from spartan.commands.images import ImageData
from spartan.commands.opening import open_model
from spartan.commands.options.train import TrainConfig
from spartan.commands.runs.facts import read_facts
from spartan.commands.runs.folder import Run
from spartan.errors import ConfigError
from spartan.teachers import Teacher


def find_teacher(config: TrainConfig, data: ImageData, device: torch.device) -> Teacher | None:
    """Open the teacher of a run, if it has one.

    Raises:
        ConfigError: It was trained on other images or classes.
        FileError: There is nothing, or the file is damaged.
    """
    if config.teacher is None:
        return None
    source = Path(config.teacher)
    ours = (1, data.channels, data.size, data.size)
    if not source.is_dir():
        model, _ = open_model(config.model, source, ours, len(data.classes))
        return Teacher(model.to(device))
    facts = read_facts(Run.open(source))
    images = facts.images or {}
    model, shape = open_model(config.teacher, None, None, len(data.classes), trust=True)
    if shape != ours or list(images.get("classes", [])) != list(data.classes):
        raise ConfigError(
            f"--teacher {config.teacher} knows {len(images.get('classes', []))} classes of images "
            f"{tuple(shape[1:])}, and these are {len(data.classes)} classes of {ours[1:]}: a "
            "teacher must have learned the same task."
        )
    learned = facts.normalize_like(data)
    return Teacher(nn.Sequential(Renormalized(data, learned), model).to(device))


class Renormalized(nn.Module):
    """Takes images that are normalised like some, and returns them normalised like others."""

    def __init__(self, given: ImageData, wanted: ImageData) -> None:
        super().__init__()
        means, spreads = (
            [torch.tensor(values).view(1, -1, 1, 1) for values in pair]
            for pair in ((given.mean, wanted.mean), (given.std, wanted.std))
        )
        self.scale = nn.Buffer(spreads[0] / spreads[1])
        self.shift = nn.Buffer((means[0] - means[1]) / spreads[1])

    def forward(self, images: Tensor) -> Tensor:
        """Return (batch, channels, size, size) in the same shape."""
        return images * self.scale + self.shift
