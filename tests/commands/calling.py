"""Calls a command in this process."""

from __future__ import annotations

import pytest

from spartan.__main__ import main


def call(*words: object) -> int:
    """Run a command; return its exit code. Whatever else comes out of it is a fault."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return int(stopped.value.code or 0)
