"""`derive_seed`: an independent random seed for each purpose and step, from one seed."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, purpose: str, number: int) -> int:
    """Derive an independent 63-bit seed, the same in every process."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
