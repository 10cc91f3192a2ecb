"""Mutual information of memory parents and classes, with a permutation test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Specialization:
    """What the parents of one memory say about classes.

    Attributes:
        shares: (classes, N), how much a class reads of each parent; rows sum to 1.
        bits: Mutual information of class and parent.
        by_chance: The mean of it over permutations of the labels.
        p: Share of permutations, the given order among them, with as much information.
    """

    shares: Tensor
    bits: float
    by_chance: float
    p: float


def specialization(
    usage: Tensor, labels: Tensor, classes: int, permutations: int = 199, seed: int = 0
) -> Specialization:
    """Measure how parents depend on classes, with a permutation test.

    Args:
        usage: (examples, N), of `MemoryModel.memory_usage`.
        labels: (examples,), classes from 0.
        classes: Number of classes.
        permutations: Permutations of the labels to compare with.
        seed: Decides the permutations.
    """
    usage, labels = usage.double().cpu(), labels.cpu()
    one_hot = torch.nn.functional.one_hot(labels, classes).double()
    found = _bits(one_hot.T @ usage)
    generator = torch.Generator().manual_seed(seed)
    chance = [
        _bits(one_hot[torch.randperm(len(labels), generator=generator)].T @ usage)
        for _ in range(permutations)
    ]
    reached = 1 + sum(bits >= found for bits in chance)
    shares = one_hot.T @ usage / one_hot.sum(0).clamp(min=1).unsqueeze(1)
    mean = sum(chance) / max(1, permutations)
    return Specialization(shares.float(), found, mean, reached / (1 + permutations))


def _bits(joint: Tensor) -> float:
    """Return the mutual information of a table of weights."""
    p = joint / joint.sum()
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    return float(torch.where(p > 0, p * (p / independent).log2(), 0.0).sum())
