"""Metrics rows: JSON lines always, TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from spartan.commands.runs.folder import Run
from spartan.errors import FileError
from spartan.files import write_text

Row = dict[str, Any]  # one line of metrics.jsonl


class MetricsLog:
    """Appends rows to `metrics.jsonl` and TensorBoard.

    Args:
        run: The run folder.
        step: Step the run continues from; rows after it, from before an interruption, are dropped.
        total_steps: Steps of the whole run; the final row of the test split is written anew.
    """

    def __init__(self, run: Run, step: int, total_steps: int) -> None:
        rows = [
            row
            for row in run.metrics()
            if row["step"] <= step and (row["split"] == "train" or row["step"] < total_steps)
        ]
        write_text(run.metrics_path, "".join(json.dumps(row) + "\n" for row in rows))
        self._path = run.metrics_path
        try:
            self._file = run.metrics_path.open("ab", buffering=0)
        except OSError as error:
            raise FileError(f"Cannot write {str(self._path)!r}: {error.strerror}.") from error
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        try:
            self._board = SummaryWriter(
                str(run.tensorboard_path), purge_step=step + 1 if step else None
            )
        except OSError as error:
            raise self._full(error) from error

    def write(self, row: Row) -> None:
        """Append one row; `step` and `split` say where it belongs, numbers are plotted."""
        # One unbuffered write a row: what failed is not tried again on closing.
        try:
            self._file.write(json.dumps(row).encode() + b"\n")
        except OSError as error:
            raise FileError(f"Cannot write {str(self._path)!r}: {error.strerror}.") from error
        try:
            for key, value in row.items() if self._board is not None else ():
                if isinstance(value, float):
                    self._board.add_scalar(f"{row['split']}/{key}", value, row["step"])
        except OSError as error:  # of its thread, which writes
            raise self._full(error) from error

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            with contextlib.suppress(OSError):  # rows are in metrics.jsonl
                self._board.close()

    def _full(self, error: OSError) -> FileError:
        folder = self._path.parent / "tensorboard"
        return FileError(f"Cannot write into {str(folder)!r}: {error.strerror or error}.")
