"""Which combination of method, allocation and reconstruction suits the time there is.

What `benchmarks/post_training.py` measured: from 50 steps on, which take as long as a sweep of
SparseGPT with a refit, FCPTS is ahead of that (74.7 and 74.4 % at 80 % sparsity, 64.4 and 63.7 % at
90 %), and gains with every further step.
"""

from __future__ import annotations

from spartan.methods.base import Method
from spartan.methods.fcpts import FCPTS
from spartan.post_training.base import LayerMethod
from spartan.post_training.sparsegpt import SparseGPT

FEWEST = 50  # steps from which on a distillation is worth it


def combination(steps: int) -> tuple[LayerMethod | Method, str, str]:
    """Return method, allocation and reconstruction for so many steps of distillation."""
    if steps >= FEWEST:
        return FCPTS(), "learned", "network"
    return SparseGPT(), "erk", "layer"
