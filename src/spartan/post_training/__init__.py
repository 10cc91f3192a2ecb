"""Compression of trained networks, with a few hundred unlabelled samples, in minutes."""

from spartan.post_training.base import LayerMethod
from spartan.post_training.compressing import compress
from spartan.post_training.distillation import Distillation
from spartan.post_training.magnitude import Magnitude
from spartan.post_training.obs import OBS
from spartan.post_training.registry import METHODS
from spartan.post_training.report import CompressionReport, LayerReport
from spartan.post_training.sparsegpt import SparseGPT
from spartan.post_training.wanda import Wanda

__all__ = [
    "METHODS",
    "OBS",
    "CompressionReport",
    "Distillation",
    "LayerMethod",
    "LayerReport",
    "Magnitude",
    "SparseGPT",
    "Wanda",
    "compress",
]
