"""Which combination of method, allocation and reconstruction suits the time there is.

What was measured (`benchmarks/post_training.py`): with time for a distillation, FCPTS, which moves
masks and rates during it, is ahead of every solver that is followed by one. Without it, one sweep
of SparseGPT with a refit is ahead of what else takes seconds.
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
