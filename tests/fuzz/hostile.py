"""Writes the small hostile files of `hostile/`: python -m tests.fuzz.hostile.

Each is a safetensors file that lies in one way, and that a reader once believed or may believe.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.fuzz.mutations import join

FOLDER = Path(__file__).parent / "hostile"
Arrays = dict[str, NDArray[Any]]
CODES = {"f4": "F32", "u1": "U8", "u2": "U16", "u8": "U64", "i4": "I32", "i8": "I64"}


def file_of(arrays: Arrays, told: Any, **changes: dict[str, Any]) -> bytes:
    """Return a packed file.

    Args:
        arrays: Its arrays.
        told: What its metadata say of its tensors.
        changes: Of the header's entry of an array; dots in names as underscores.
    """
    header: dict[str, Any] = {"__metadata__": {"spartan.packed": told}}
    data = b""
    for name, array in arrays.items():
        header[name] = {
            "dtype": CODES[array.dtype.str[1:]],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
            **changes.get(name.replace(".", "_"), {}),
        }
        data += array.tobytes()
    return join(header, data)


def packed(layout: str, dtype: str = "F32") -> str:
    """Return the metadata of one packed tensor, `w`."""
    tensors = {"w": {"layout": layout, "dtype": dtype}}
    return json.dumps({"version": 1, "tensors": tensors, "aliases": {}})


def columns(**changes: Any) -> Arrays:
    """Return a tensor of 4 x 8 with three values, by columns."""
    arrays: Arrays = {
        "w.compressed": np.ones(3, np.float32),
        "w.columns": np.array([1, 2, 3], np.uint16),
        "w.row_starts": np.array([0, 1, 2, 3, 3], np.int32),
        "w.shape": np.array([4, 8], np.int64),
    }
    return arrays | {f"w.{name}": value for name, value in changes.items()}


def gaps(values: int, shape: list[int]) -> Arrays:
    """Return values without gaps between them, of a tensor of any shape."""
    return {
        "w.compressed": np.ones(values, np.float32),
        "w.gaps": np.zeros(values, np.uint8),
        "w.shape": np.array(shape, np.int64),
    }


def files() -> dict[str, bytes]:
    """Return all of them by name."""
    high = 1 << 63
    starts = np.array([0, high, high, 3, 3], np.uint64)
    down = np.array([0, 3, -(1 << 31), 3, 3], np.int32)
    deep = "[" * 3000
    arrays = columns()
    ones: Arrays = {"w": np.ones(4, np.float32)}
    return {
        "row_starts_beyond_int64": file_of(columns(row_starts=starts), packed("columns")),
        "columns_beyond_int64": file_of(
            columns(columns=np.array([high + 1, high + 2, 3], np.uint64)), packed("columns")
        ),
        "row_starts_fall": file_of(columns(row_starts=down), packed("columns")),
        "column_outside": file_of(
            columns(columns=np.array([1, 2, 8], np.uint16)), packed("columns")
        ),
        "floats_as_bytes": file_of(arrays, packed("columns", "U8")),
        "expands_a_million_times": file_of(gaps(1, [1 << 14, 1 << 14]), packed("gaps")),
        "of_no_rows_and_endless_columns": file_of(gaps(0, [0, 1 << 62]), packed("gaps")),
        "shape_below_zero": file_of(gaps(1, [-4, -8]), packed("gaps")),
        "product_of_shape_overflows": file_of(gaps(1, [1 << 32, 1 << 32, 2]), packed("gaps")),
        "more_values_than_places": file_of(gaps(33, [4, 8]), packed("gaps")),
        "deep_metadata": file_of(arrays, deep),
        "metadata_of_a_newer_version": file_of(arrays, packed("columns").replace("1", "9", 1)),
        "layout_that_nobody_knows": file_of(arrays, packed("rows")),
        "alias_of_nothing": file_of(
            ones, json.dumps({"version": 1, "tensors": {}, "aliases": {"v": "u"}})
        ),
        "offsets_beyond_the_end": file_of(ones, "null", w={"data_offsets": [0, 1 << 40]}),
        "offsets_backwards": file_of(ones, "null", w={"data_offsets": [16, 0]}),
        "header_longer_than_the_file": (1 << 40).to_bytes(8, "little") + b"{}",
        "header_of_nothing": (0).to_bytes(8, "little"),
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, raw in files().items():
        (FOLDER / f"{name}.safetensors").write_bytes(raw)
