"""Metrics rows: JSON lines always, TensorBoard where it is installed."""

from __future__ import annotations

import json
from typing import Any

from spartan.errors import FileError
from spartan.files import write_text
from spartan.commands.runs.folder import Run

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
        self._board = SummaryWriter(
            str(run.tensorboard_path), purge_step=step + 1 if step else None
        )

    def write(self, row: Row) -> None:
        """Append one row; `step` and `split` say where it belongs, numbers are plotted."""
        # One unbuffered write a row: what failed is not tried again on closing.
        try:
            self._file.write(json.dumps(row).encode() + b"\n")
        except OSError as error:
            raise FileError(f"Cannot write {str(self._path)!r}: {error.strerror}.") from error
        if self._board is not None:
            for key, value in row.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{row['split']}/{key}", value, row["step"])

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()
