"""Several processes with averaged gradients do what one does with all the data."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spartan import Budget, Sparsifier
from spartan.always_sparse import convert
from spartan.errors import BudgetError
from spartan.methods import ConstrainedL0, RigL, Spartan
from spartan.methods.masking.state import saved

METHODS = {"constrained-l0": ConstrainedL0, "spartan": Spartan}
STEPS = 12

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
pytestmark = pytest.mark.filterwarnings("ignore:The gates of")


def plain(state: dict[str, Any]) -> dict[str, float]:
    """The numbers of a group's state, flat."""
    flat: dict[str, float] = {}
    for name, value in state.items():
        for i, number in enumerate(value if isinstance(value, list) else [value]):
            if number is not None:
                flat[f"{name} {i}"] = float(number)
    return flat


def train(method: str, rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    model = DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    sparsifier = Sparsifier(net, optimizer, METHODS[method](), Budget(density=0.25), STEPS)
    torch.manual_seed(rank)  # what a process draws by itself must not matter
    for step in range(STEPS):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        model(x.chunk(world)[rank]).square().mean().backward()
        optimizer.step()
    sparsifier.finalize()
    numbers = [plain(saved(group.state)) for group in sparsifier.run.groups]
    return {"weights": net.state_dict(), "numbers": numbers}


@needs_gloo
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_do_what_one_does(method: str, results: Path) -> None:
    first, second = (torch.load(results / f"{method}-{rank}.pt") for rank in range(2))
    alone = train(method, 0, 1)
    for name, weight in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-6, atol=1e-9)
    assert first["numbers"] == second["numbers"]
    for ours, theirs in zip(alone["numbers"], first["numbers"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-6)


def train_sparse(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(rank)  # every process draws another graph; that of the first one is taken
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)).double()
    convert(net, 0.3, every_unit=True)
    if world == 1:
        model: nn.Module = net
    else:
        net(torch.randn(2, 12, dtype=torch.float64))  # makes indices of the graph drawn here
        model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    budget = Budget(density=0.3, allocation="er")
    sparsifier = Sparsifier(net, optimizer, RigL(period=2, end=1.0), budget, STEPS)
    before = sparsifier.selected()
    torch.manual_seed(rank)
    for step in range(STEPS):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        model(x.chunk(world)[rank]).square().mean().backward()
        optimizer.step()
    assert sparsifier.churn(before) > 0.1
    sparsifier.finalize()
    return net.state_dict()


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting, limit = f"file://{folder}/meet", timedelta(seconds=60)
    dist.init_process_group("gloo", meeting, limit, rank=rank, world_size=world)
    for method in METHODS:
        torch.save(train(method, rank, world), f"{folder}/{method}-{rank}.pt")
    torch.save(train_sparse(rank, world), f"{folder}/grown-{rank}.pt")
    net = convert(nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)), 0.3, every_unit=True)
    with pytest.raises(BudgetError, match="several processes"):
        Sparsifier(net, None, RigL(), Budget(density=0.3), STEPS)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes trained: started once, as that takes most of the time."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (2, str(folder)), nprocs=2)
    return folder


@needs_gloo
def test_two_processes_grow_what_one_does(results: Path) -> None:
    first, second = (torch.load(results / f"grown-{rank}.pt") for rank in range(2))
    alone = train_sparse(0, 1)
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-6, atol=1e-9)
