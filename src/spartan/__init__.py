"""Train, prune and ship PyTorch networks at exactly the sparsity asked for."""

import importlib
from typing import Any

from spartan import adapters, always_sparse, kernels, methods, old_names, post_training
from spartan.budgets import Budget
from spartan.deploy import accelerate, load, purge, save
from spartan.errors import SpartanError
from spartan.norms import recalibrated
from spartan.post_training import CompressionReport, compress
from spartan.selection import hard_topk, soft_topk
from spartan.sparsifier import Sparsifier, freeze
from spartan.teachers import Teacher
from spartan.weights import NM, Block, Channel, Unstructured

__version__ = "0.1.0"

__all__ = [
    "NM",
    "Block",
    "Budget",
    "Channel",
    "CompressionReport",
    "Sparsifier",
    "SpartanError",
    "Teacher",
    "Unstructured",
    "accelerate",
    "adapters",
    "always_sparse",
    "compress",
    "freeze",
    "hard_topk",
    "kernels",
    "load",
    "methods",
    "post_training",
    "purge",
    "recalibrated",
    "save",
    "soft_topk",
    "world_model",
]

old_names.install()


def __getattr__(name: str) -> Any:
    """Import the world model when it is first asked for: few need it."""
    if name == "world_model":
        return importlib.import_module("spartan.world_model")
    raise AttributeError(f"module 'spartan' has no attribute {name!r}")
