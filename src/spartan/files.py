"""Atomic file writes; nested states as safetensors + JSON, without pickle."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from spartan.checksums import Checksums
from spartan.container import bits_of, entry_of, write_file
from spartan.errors import FileError

_UMASK = os.umask(0)
os.umask(_UMASK)
_KEY = "spartan"  # metadata entry that holds the JSON part


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` produce a temporary file beside `path`, then move it there.

    Raises:
        FileError: Writing failed (disk full, no permission); what was at `path` before is intact.
    """
    if not path.name:
        raise FileError(f"{str(path)!r} names no file to write.")
    # Threads may write one path at a time.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_UMASK)  # safetensors would leave it to its owner alone
        temporary.replace(path)
    except FileError:
        raise  # of what was read meanwhile
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"Cannot write {str(path)!r}: {error}. Nothing that was written before is lost; free "
            "space or choose another folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what `write_atomically` was writing in a folder when a process was killed.

    Only who holds the folder alone may do so.
    """
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.[0-9a-f]{16}\.tmp", path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a nested state of dicts, lists, tensors and plain values into one safetensors file.

    The tensors are stored under their path in the nesting; the rest is JSON in the file's
    metadata, with a reference where a tensor was.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _detach(state, "", tensors)
    save_tensors(path, tensors, skeleton)


def load_state(path: Path) -> Any:
    """Read what `save_state` wrote.

    Raises:
        FileError: The file is missing, truncated or of another kind.
    """
    tensors, skeleton = load_tensors(path)
    try:
        return _attach(skeleton, tensors)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise FileError(f"{str(path)!r} is not a checkpoint of this program.") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Any) -> None:
    """Write named tensors and a JSON value into a safetensors file, atomically."""
    # The widest first, so that all of them are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries = [entry_of(name, tensors[name]) for name in names]
    header = {_KEY: json.dumps(metadata), "format": "pt"}

    def write(temporary: Path) -> None:
        write_file(temporary, entries, header, lambda: (bits_of(tensors[name]) for name in names))

    write_atomically(path, write)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read named tensors, and the JSON value written with them (None in files of others).

    Raises:
        FileError: The file is missing, unreadable or damaged.
    """
    if not path.is_file():
        raise FileError(f"There is no file {str(path)!r}.")
    try:
        with safe_open(path, "pt") as file:
            names, metadata = file.keys(), file.metadata() or {}
            sums = Checksums(metadata, names)
            tensors = {name: sums.read(file, name) for name in names}
        text = metadata.get(_KEY)
        return tensors, None if text is None else json.loads(text)
    except FileError as error:
        raise FileError(f"{str(path)!r} is damaged: {error}.") from error
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise FileError(f"{str(path)!r} is damaged or not a safetensors file: {error}.") from error


def _detach(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Replace tensors by references, and dicts by lists of pairs (their keys may be integers)."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[k, _detach(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_detach(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"{path} holds a {type(value).__name__}, which a state cannot hold.")


def _attach(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _attach(value, tensors) for key, value in content}
    if kind == "list":
        return [_attach(value, tensors) for value in content]
    if kind == "tuple":
        return tuple(_attach(value, tensors) for value in content)
    return content
