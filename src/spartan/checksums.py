"""Checksums of safetensors files: CRC-32 of each array and of the metadata, checked on reading.

They are one entry of the metadata: eight hexadecimal digits for the other entries, then eight for
each array, in the order of their names. What is summed is an array's name, dtype and shape, and its
bytes. Files without the entry are read as they are: others write none.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spartan.errors import FileError

KEY = "spartan.crc32"
_DIGITS = 8
_EDITED = f" (if another program has edited it, let that leave {KEY!r} out of the metadata)"


class Checksums:
    """What a file says that its arrays are.

    Attributes:
        told: Whether the file has checksums.

    Args:
        metadata: All metadata of the file.
        names: Of all its arrays.

    Raises:
        FileError: The metadata are not those that were written; the message is a reason, for a
            sentence about the file.
    """

    def __init__(self, metadata: Mapping[str, str], names: Collection[str]) -> None:
        text = metadata.get(KEY)
        self.told = text is not None
        self._left: dict[str, str] = {}
        if text is None:
            return
        digits = [text[i : i + _DIGITS] for i in range(0, len(text), _DIGITS)]
        if len(digits) != 1 + len(names) or digits[0] != of_metadata(metadata):
            raise FileError(f"its checksums say that its header is not what was written{_EDITED}")
        self._left = dict(zip(sorted(names), digits[1:], strict=True))

    def read(self, file: Any, name: str) -> Tensor:
        """Return an array, and refuse one that is not as it was written; each is summed up once.

        Args:
            file: What `safetensors.safe_open` opened.
            name: The array's name there.

        Raises:
            FileError: As of the class.
        """
        tensor: Tensor = file.get_tensor(name)
        digits = self._left.get(name)
        if digits is None:
            return tensor
        told = file.get_slice(name)
        if digits != of_array(name, told.get_dtype(), told.get_shape(), bytes_of(tensor)):
            raise FileError(
                f"the checksum of {name!r} says that it is not what was written{_EDITED}"
            )
        self._left.pop(name, None)  # another thread may have been faster
        return tensor


def of_array(name: str, code: str, shape: Sequence[int], data: memoryview) -> str:
    """Return the checksum of an array."""
    start = zlib.crc32(json.dumps([name, code, list(shape)]).encode())
    return f"{zlib.crc32(data, start):0{_DIGITS}x}"


def of_metadata(metadata: Mapping[str, str]) -> str:
    """Return the checksum of all entries of the metadata but the one of checksums."""
    others = sorted(item for item in metadata.items() if item[0] != KEY)
    return f"{zlib.crc32(json.dumps(others).encode()):0{_DIGITS}x}"


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, in the order of its entries."""
    plain = tensor.detach().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data
