"""Helpers of the accuracy benchmarks: one training run in a temporary folder."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace

from spartan.commands.images import ImageData, MemoryImages
from spartan.commands.options.train import TrainConfig
from spartan.commands.runs.folder import Run
from spartan.commands.train.trainer import Row, Trainer


def train(config: TrainConfig, data: ImageData) -> Row:
    """Return the row of the held-out images after the last step."""
    return train_with(config, data)[1]


def train_with(config: TrainConfig, data: ImageData) -> tuple[Trainer, Row]:
    """Return the trainer, with the trained model, and the row of the held-out images."""
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, out=f"{folder}/run")
        trainer = Trainer(config, data)
        return trainer, trainer.fit(Run.create(config), lambda row: None, lambda step, row: None)


def first_images(data: ImageData, count: int) -> ImageData:
    """Return the data with at most so many training images."""
    assert isinstance(data.train, MemoryImages)
    train = MemoryImages(data.train.images[:count], data.train.labels[:count])
    return replace(data, train=train)


def mean_and_spread(accuracies: Sequence[float]) -> str:
    """Return percent, mean and standard deviation over seeds."""
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return f"{100 * statistics.mean(accuracies):.2f} ± {100 * spread:.2f}"
