"""How files are damaged: texts, values of JSON, headers and bytes; and for how long."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import THOROUGH

JUNK: list[Any] = [
    *(None, True, 0, -1, 1e400, float("nan"), 30_000, 10**30, "", "x", "[/red]", "\x1b[31m"),
    *([], {}, [1], {"a": 1}, [[[]]], "9" * 5000, 1.5, 10_000_000),
]
DTYPES = [
    *("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "BOOL"),
    *("F16", "BF16", "F32", "F64", "C64", "F8_E4M3", "F9"),
]
TEXTS = ["", "{", "[" * 100_000, "\x00", "null", "12\n"]
MINUTES = float(os.environ.get("SPARTAN_FUZZ_MINUTES", "0"))


def draws(count: int) -> Iterator[tuple[str, random.Random]]:
    """Yield a seed, to be named where something is wrong, and the generator it makes.

    Args:
        count: How many seeds, always the same ones; with SPARTAN_FUZZ_MINUTES, new ones for as many
            minutes.
    """
    if not MINUTES:
        for i in range(10 * count if THOROUGH else count):
            yield str(i), random.Random(str(i))
        return
    end = time.monotonic() + 60 * MINUTES
    while time.monotonic() < end:
        seed = f"{random.SystemRandom().getrandbits(64):x}"
        yield seed, random.Random(seed)


def changed(value: Any, draw: random.Random) -> Any:
    """Return a value of JSON of which something, somewhere, is another."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key, chance = draw.choice(list(value)), draw.random()
        if chance < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        i = draw.randrange(len(value))
        return [*value[:i], changed(value[i], draw), *value[i + 1 :]]
    return draw.choice(JUNK)


def change_text(path: Path, draw: random.Random) -> None:
    """Change a value of a file of JSON, or of one of JSON lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".json":
        lines = ["".join(lines)]
    i = draw.randrange(len(lines))
    kept = draw.random() < 0.8
    lines[i] = json.dumps(changed(json.loads(lines[i]), draw)) if kept else draw.choice(TEXTS)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a safetensors file."""
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def join(header: dict[str, Any], data: bytes) -> bytes:
    """Return the safetensors file of a header and data."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def change_metadata(path: Path, draw: random.Random) -> None:
    """Change what a safetensors file of ours says of itself, as somebody who lies would."""
    header, data = split(path.read_bytes())
    metadata = header["__metadata__"]
    metadata.pop("spartan.crc32")  # the liar could sum up as well
    key = next(key for key in metadata if key.startswith("spartan"))
    kept = draw.random() < 0.85
    own = json.loads(metadata[key])
    metadata[key] = json.dumps(changed(own, draw)) if kept else draw.choice(TEXTS)
    path.write_bytes(join(header, data))


def change_arrays(path: Path, draw: random.Random) -> None:
    """Change bytes of the arrays of a safetensors file, or what its header says of them."""
    header, data = split(path.read_bytes())
    header["__metadata__"].pop("spartan.crc32")
    array = header[draw.choice([key for key in header if key != "__metadata__"])]
    chance = draw.random()
    if chance < 0.6:
        begin, end = array["data_offsets"]
        edited = bytearray(data)
        for i in (
            draw.choices(range(begin, end), k=draw.choice((1, 1, 2, 8))) if end > begin else ()
        ):
            edited[i] = draw.choice((0, 1, 127, 128, 255, edited[i] ^ 1 << draw.randrange(8)))
        data = bytes(edited)
    elif chance < 0.8:
        array["dtype"] = draw.choice(DTYPES)
    else:
        key = draw.choice(("shape", "data_offsets"))
        array[key] = changed(array[key], draw)
    path.write_bytes(join(header, data))


def flip_bit(path: Path, draw: random.Random) -> None:
    """Flip one bit of a file, as a bad disk or cable does."""
    raw = bytearray(path.read_bytes())
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)
