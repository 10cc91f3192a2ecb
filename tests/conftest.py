"""Shared small models and paths."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
VECTORS = Path(__file__).parent / "vectors"


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    return json.loads((VECTORS / "spartan_vectors.json").read_text())


@pytest.fixture(scope="session")
def cifar10() -> str:
    """Folder with CIFAR-10 as parquet; absent on most machines."""
    folder = Path(os.environ.get("SPARTAN_TEST_DATA", ROOT.parent / "shared" / "data")) / "cifar10"
    if not (folder / "train.parquet").exists():
        pytest.skip(
            "CIFAR-10 is not here; set SPARTAN_TEST_DATA to a folder with cifar10/*.parquet"
        )
    return str(folder)


class Net(nn.Module):
    """A small network with a convolution, a norm and two linear layers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, dtype=dtype)
        self.norm = nn.BatchNorm2d(8, dtype=dtype)
        self.fc1 = nn.Linear(8 * 16, 16, dtype=dtype)
        self.fc2 = nn.Linear(16, 8, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


@pytest.fixture
def make_net() -> Callable[..., Net]:
    def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
        torch.manual_seed(seed)
        return Net(dtype)

    return make


def batch(step: int, dtype: torch.dtype = torch.float32, size: int = 8) -> tuple[Tensor, Tensor]:
    """The batch of one training step, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 4, 4, 4, generator=generator).to(dtype)
    y = torch.randint(0, 8, (size,), generator=generator)
    return x, y


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    """One ordinary training step."""
    x, y = batch(step, next(model.parameters()).dtype)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x).float(), y)
    loss.backward()
    optimizer.step()
    return loss.item()
