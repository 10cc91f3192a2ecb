"""Native CPU kernels for mask updates and sparse products, each with an equal torch version.

The native kernels serve contiguous float32 tensors on the CPU. Everything else (CUDA, other dtypes,
machines without a compiler) runs the torch version: the same hard masks bit for bit, the same soft
masks to 1e-6. `backend()` says which one is in use; the environment variable `SPARTAN_KERNELS`
forces one.
"""

from spartan.kernels.dispatch import Backend, backend, using
from spartan.kernels.finiteness import finite
from spartan.kernels.projection import mask_, project
from spartan.kernels.scanning import ScanRequest, ScanResult, scan
from spartan.kernels.scores import Scores
from spartan.kernels.selection import Cutoff, kept, masks_of
from spartan.kernels.soft import Dual, Mass, damp, masses, pull_back

__all__ = [
    "Backend",
    "Cutoff",
    "Dual",
    "Mass",
    "ScanRequest",
    "ScanResult",
    "Scores",
    "backend",
    "damp",
    "finite",
    "kept",
    "mask_",
    "masks_of",
    "masses",
    "project",
    "pull_back",
    "scan",
    "using",
]
