"""Random graphs with exactly as many connections as asked for, without a dense mask."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spartan.kernels.connections import Connections


def random_connections(outputs: int, inputs: int, count: int, every_unit: bool) -> Connections:
    """Draw an Erdős-Rényi graph with an exact number of connections, from torch's generator.

    Args:
        outputs: Output units.
        inputs: Input units.
        count: Connections, at most outputs * inputs; at least `outputs` with `every_unit`.
        every_unit: Whether every output unit is given a connection first.
    """
    if not every_unit:
        return Connections.from_keys(distinct(count, outputs * inputs), outputs, inputs)
    own = torch.arange(outputs, device="cpu") * inputs
    own += torch.randint(inputs, (outputs,), device="cpu")
    others = nth_outside(own, distinct(count - outputs, outputs * inputs - outputs))
    return Connections.from_keys(torch.cat((own, others)).sort().values, outputs, inputs)


def distinct(count: int, population: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw `count` of the numbers 0 ... population - 1: int64, sorted, each subset as likely.

    Memory and time grow with `count`, not with the population.
    """
    if 2 * count > population:
        drawn = torch.randperm(population, generator=generator, device="cpu")[:count]
        return drawn.sort().values
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    while drawn.numel() < count:
        missing = count - drawn.numel()
        draws = (missing + missing // 8 + 16,)
        more = torch.randint(population, draws, generator=generator, device="cpu")
        drawn = rising(torch.cat((drawn, more)))
    surplus = drawn.numel() - count
    if surplus:
        kept = torch.ones_like(drawn, dtype=torch.bool)
        order = torch.randperm(drawn.numel(), generator=generator, device="cpu")
        kept[order[:surplus]] = False
        drawn = drawn[kept]
    return drawn


def rising(numbers: Tensor) -> Tensor:
    """Sort, and leave out what is there twice."""
    if numbers.device.type == "cpu":
        # Several times as fast as torch's.
        ordered = torch.from_numpy(np.sort(numbers.numpy()))
    else:
        ordered = numbers.sort().values
    first = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=first[1:])
    return ordered[first]


def nth_outside(taken: Tensor, ranks: Tensor) -> Tensor:
    """Return the numbers that are at these ranks among those not taken.

    Args:
        taken: int64, sorted, distinct, not negative.
        ranks: int64, counted from 0.
    """
    # Before the i-th taken number lie taken[i] - i numbers that are not.
    before = taken - torch.arange(taken.numel(), device=taken.device)
    return ranks + torch.searchsorted(before, ranks, right=True)
