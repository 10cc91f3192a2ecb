"""The first uses of a layer, from several threads at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from spartan.always_sparse import convert

THREADS, LAYERS = 8, 60


def test_first_uses_from_threads_agree() -> None:
    torch.manual_seed(0)
    barrier = threading.Barrier(THREADS)

    def use(layer: nn.Module, batch: int) -> tuple[Tensor, Tensor]:
        x = torch.ones(batch, 96, requires_grad=True)
        barrier.wait()
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        return y.detach(), gradient

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(LAYERS):
            model = nn.Sequential(nn.Linear(96, 80))
            convert(model, 0.3)
            batches = [1 + 7 * (i % 4) for i in range(THREADS)]
            found = list(pool.map(use, [model[0]] * THREADS, batches))
            for (y, gradient), batch in zip(found, batches, strict=True):
                x = torch.ones(batch, 96, requires_grad=True)
                wanted = model[0](x)
                torch.testing.assert_close(y, wanted.detach())
                (again,) = torch.autograd.grad(wanted.square().sum(), x)
                torch.testing.assert_close(gradient, again)
