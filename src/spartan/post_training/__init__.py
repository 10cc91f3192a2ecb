"""Post-training pruning: compresses a trained network with unlabelled samples."""

from typing import Any

from spartan.errors import renamed
from spartan.post_training.alps import ALPS
from spartan.post_training.compressing import compress
from spartan.post_training.compression_plan import METHODS
from spartan.post_training.distillation import Distillation
from spartan.post_training.obs import OBS
from spartan.post_training.report import CompressionReport, LayerReport
from spartan.post_training.solver import LayerSolver, MagnitudeSolver
from spartan.post_training.sparsegpt import SparseGPT
from spartan.post_training.wanda import Wanda

__all__ = [
    "ALPS",
    "METHODS",
    "OBS",
    "CompressionReport",
    "Distillation",
    "LayerReport",
    "LayerSolver",
    "MagnitudeSolver",
    "SparseGPT",
    "Wanda",
    "compress",
]

_RENAMED = {"LayerMethod": "LayerSolver", "Magnitude": "MagnitudeSolver"}


def __getattr__(name: str) -> Any:
    """Return what is asked for by the name it had in version 0.1."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = f"spartan.post_training.{_RENAMED[name]}"
    renamed(f"spartan.post_training.{name}", new, stacklevel=3)
    return globals()[_RENAMED[name]]
