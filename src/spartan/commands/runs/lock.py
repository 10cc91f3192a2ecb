"""One process at a time works in a run folder: a lock that ends with its process."""

from __future__ import annotations

import os
from pathlib import Path

from spartan.errors import ConfigError, FileError

try:
    import fcntl
except ImportError:  # Windows has no locks of folders: there, nobody is kept out
    fcntl = None  # type: ignore[assignment]

_HELD: dict[tuple[int, int], int] = {}  # device and inode of a folder: its open descriptor


def hold(folder: Path) -> None:
    """Make a folder if there is none, and keep other processes out until this one ends.

    The lock is the kernel's, on the open folder: it leaves no file behind, and a process that is
    killed gives it back. Holding a folder again, in the same process, does nothing.

    Raises:
        ConfigError: Another process works in the folder.
        FileError: The folder cannot be made or opened.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return
        found = folder.stat()
        place = found.st_dev, found.st_ino
        if place in _HELD:
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"Cannot make the folder {str(folder)!r}: {reason}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError(
            f"Another process is working in {str(folder)!r}: wait until it ends, or give "
            "another --out."
        ) from error
    except OSError:  # a file system without locks: as on Windows
        os.close(descriptor)
        return
    _HELD[place] = descriptor
