"""Interleaved timing of several functions, and a warning when the machine is busy."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

BUSY = 0.15  # fraction of all cores that others may use before timings are in doubt


@dataclass(frozen=True)
class Timing:
    """How long something takes.

    Attributes:
        median: Seconds.
        low: First quartile, seconds.
        high: Third quartile, seconds.
        rounds: Number of measurements.
    """

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{1e3 * self.median:.3f} ms ({1e3 * self.low:.3f} to {1e3 * self.high:.3f})"


def time_side_by_side(
    functions: Sequence[Callable[[], object]], seconds: float = 0.2, least: int = 5
) -> list[Timing]:
    """Time functions in turns, so that all meet the same disturbances.

    Every timed call follows an untimed one of the same function, which brings its weights back into
    the caches.

    Args:
        functions: What to time.
        seconds: How long to measure, all together.
        least: Rounds that are run even if they take longer.
    """
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while len(times[0]) < least or time.perf_counter() < end:
        for function, own in zip(functions, times, strict=True):
            function()
            _wait_for_gpu()
            begin = time.perf_counter()
            function()
            _wait_for_gpu()
            own.append(time.perf_counter() - begin)
    return [_summary(own) for own in times]


def busy_cores(seconds: float = 0.25) -> float:
    """Return how many cores other work is using now; 0 where that cannot be told."""
    before = _cpu_ticks()
    time.sleep(seconds)
    after = _cpu_ticks()
    if before is None or after is None or after[1] == before[1]:
        return 0.0
    share = (after[0] - before[0]) / (after[1] - before[1])
    return share * (os.cpu_count() or 1)


def busy_warning() -> str:
    """Return a warning if other work would disturb timings, else nothing."""
    cores = busy_cores()
    if cores <= BUSY * (os.cpu_count() or 1):
        return ""
    return (
        f"This machine is busy: other work uses {cores:.1f} of {os.cpu_count()} cores. The times "
        "below are too long and may favour either side; stop the other work and run again."
    )


def _summary(times: list[float]) -> Timing:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, low, high, len(times))


def _wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _cpu_ticks() -> tuple[int, int] | None:
    """Return busy and total ticks of all cores since boot."""
    try:
        fields = [
            int(x)
            for x in Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]
        ]
    except (OSError, ValueError):
        return None
    total = sum(fields)
    return total - fields[3] - fields[4], total
