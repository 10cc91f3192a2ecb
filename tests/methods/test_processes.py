"""Several processes with averaged gradients do what one does with all the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spartan import Budget, Sparsifier
from spartan.methods import ConstrainedL0, Spartan

METHODS = {"constrained-l0": ConstrainedL0, "spartan": Spartan}
STEPS = 12

pytestmark = pytest.mark.filterwarnings("ignore:The gates of")


def train(method: str, rank: int, world: int) -> dict[str, Any]:
    torch.set_num_threads(1)
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
    numbers = [dict(group.numbers) for group in sparsifier.groups]
    return {"weights": net.state_dict(), "numbers": numbers}


def work(rank: int, method: str, world: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(train(method, rank, world), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_do_what_one_does(method: str, tmp_path: Path) -> None:
    mp.spawn(work, (method, 2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = train(method, 0, 1)
    torch.set_num_threads(2)
    for name, weight in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-6, atol=1e-9)
    assert first["numbers"] == second["numbers"]
    for ours, theirs in zip(alone["numbers"], first["numbers"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-6)
