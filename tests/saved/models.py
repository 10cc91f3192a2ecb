"""A model small enough for its run folders to be kept beside the tests."""

from __future__ import annotations

from torch import nn


def narrow_mlp(channels: int, image_size: int, classes: int) -> nn.Module:
    """Return a multilayer perceptron with one hidden layer of eight units."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * image_size**2, 8),
        nn.ReLU(),
        nn.Linear(8, classes),
    )
