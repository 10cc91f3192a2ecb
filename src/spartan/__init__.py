"""Train, prune and ship PyTorch networks at exactly the sparsity asked for."""

from spartan import adapters, always_sparse, kernels, methods, post_training
from spartan.budget import Budget
from spartan.deploy import accelerate, load, purge, save
from spartan.errors import SpartanError
from spartan.freezing import freeze
from spartan.patterns import NM, Block, Channel, Unstructured
from spartan.post_training import CompressionReport, compress
from spartan.selection import hard_topk, soft_topk
from spartan.sparsifier import Sparsifier

__version__ = "0.1.0"

__all__ = [
    "NM",
    "Block",
    "Budget",
    "Channel",
    "CompressionReport",
    "Sparsifier",
    "SpartanError",
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
    "save",
    "soft_topk",
]
