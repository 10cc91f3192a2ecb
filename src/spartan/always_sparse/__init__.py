"""Always-sparse layers: linear and convolution layers that store only nonzeros in training."""

from spartan.always_sparse.conversion import convert, density, sparse_layers, to_dense
from spartan.always_sparse.convolution import SparseConv2d
from spartan.always_sparse.layer import SparseLayer
from spartan.always_sparse.linear import SparseLinear

__all__ = [
    "SparseConv2d",
    "SparseLayer",
    "SparseLinear",
    "convert",
    "density",
    "sparse_layers",
    "to_dense",
]
