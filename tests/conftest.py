"""Shared small models and paths, and how random numbers are drawn in tests."""

from __future__ import annotations

import json
import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
VECTORS = Path(__file__).parent / "vectors"
# `make test` tries fewer random examples and combinations than `make thorough`, which sets this.
THOROUGH = bool(os.environ.get("SPARTAN_TEST_THOROUGH"))


class _TorchRandom:
    """torch's generator, for hypothesis to seed before each example, as it does Python's own."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis refers to it weakly
hypothesis.register_random(_TORCH_RANDOM)
# The same examples each time, but in `make thorough`. A deadline would measure the machine.
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    derandomize=not THOROUGH,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")


def examples(count: int) -> int:
    """Return how many random examples to try: all, or a quarter."""
    return count if THOROUGH else max(10, count // 4)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    # The models of tests are so small that a second thread costs more than it brings.
    torch.set_num_threads(1)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Set torch's number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_rounded(found: Tensor, wanted: Tensor, magnitude: Tensor, terms: int) -> None:
    """Assert that every entry is as wanted, but for what rounding a sum of products allows.

    Args:
        found: What was computed.
        wanted: The same in float64.
        magnitude: The sums of the absolute products. A result may vanish, these do not.
        terms: How many products each entry adds up. The worst case is ε times this; roundings of
            either sign add up to its root.
    """
    assert found.shape == wanted.shape
    info = torch.finfo(found.dtype)
    bound = (4 + 4 * terms**0.5) * info.eps * magnitude.double() + info.tiny
    error = (found.double() - wanted.double()).abs()
    assert bool((error <= bound).all()), float((error / bound).max())


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    return json.loads((VECTORS / "spartan_vectors.json").read_text(encoding="utf-8"))


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


@pytest.fixture
def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def leave(group: Any) -> None:
    """End a process of a group, `torch.distributed`, when all have come so far.

    Threads of gloo may still run when the interpreter is torn down, and would abort it.
    """
    group.barrier()
    group.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
