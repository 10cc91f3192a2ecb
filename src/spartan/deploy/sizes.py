"""File sizes of a model: dense, packed, and dense compressed with zstd."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from spartan.container import chunks_of
from spartan.deploy.packing import Stored
from spartan.errors import MissingExtraError

# Of the comparison: the level that the tables of the README name.
ZSTD_LEVEL = 12


@dataclass(frozen=True)
class Sizes:
    """What packing a model came to.

    Attributes:
        dense: Bytes of all tensors, dense.
        packed: Bytes of the packed file, all of it.
        zstd: Bytes that zstd makes of the dense tensors; None if that was not asked.
    """

    dense: int
    packed: int
    zstd: int | None

    def __str__(self) -> str:
        ratio = self.packed / max(1, self.dense)
        if ratio >= 1:
            text = f"not compressed: {self.packed:,} bytes, and {self.dense:,} dense"
        else:
            text = f"{self.dense:,} bytes dense, {self.packed:,} packed: {ratio:.4f} of them"
        if self.zstd is None:
            return text
        share = self.zstd / max(1, self.dense)
        return f"{text}; zstd -{ZSTD_LEVEL} of the dense file: {self.zstd:,} ({share:.4f})"


def measure_sizes(
    stored: Sequence[Stored], file_bytes: int, tensors: Mapping[str, Tensor] | None
) -> Sizes:
    """Sum up.

    Args:
        stored: What `save` returned.
        file_bytes: Size of the packed file.
        tensors: The dense tensors, to compress them with zstd too.

    Raises:
        MissingExtraError: zstandard is not installed.
    """
    dense = sum(s.dense_bytes for s in stored)
    if tensors is None:
        return Sizes(dense, file_bytes, None)
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError as error:
        raise MissingExtraError(
            "Comparing with zstd needs zstandard: pip install 'spartan-torch[cli]', or --no-zstd."
        ) from error
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compressobj()
    size = 0
    for chunk in chunks_of(tensors[s.name] for s in stored):
        size += len(compressor.compress(chunk))
    return Sizes(dense, file_bytes, size + len(compressor.flush()))
