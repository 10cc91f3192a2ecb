"""Progress bars and result lines in the terminal while a run trains."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from spartan.commands.runs.metrics import Row


class Display:
    """A live progress bar in a terminal; one line per tested epoch elsewhere.

    Args:
        console: Where to print.
        total_steps: Steps of the whole run.
        step: Step the run continues from.
    """

    def __init__(self, console: Console, total_steps: int, step: int) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("train", total=total_steps, completed=step, metrics="")
        self.began = time.perf_counter()

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def tick(self, step: int, row: Row) -> None:
        """Move the bar; `row` is the latest training row, empty before the first."""
        self.progress.update(self.task, completed=step, metrics=_metrics(row))

    def show(self, row: Row) -> None:
        """Print one line for a row of the test split."""
        self.console.print(
            f"epoch {row['epoch']:.0f}  test accuracy {row['accuracy']:.2%}  "
            f"loss {row['loss']:.4f}  density {row['density']:.2%}  "
            f"{time.perf_counter() - self.began:.0f} s",
            highlight=False,
        )


def _metrics(row: Row) -> str:
    if not row:
        return ""
    beta = f"  β {row['beta']:.3g}" if "beta" in row else ""
    return (
        f"loss {row['loss']:.3f}  acc {row['accuracy']:.1%}  density {row['density']:.2%}{beta}  "
        f"{row['images_per_second']:,.0f} img/s"
    )


class Phases:
    """A live progress bar for each phase of a job, in a terminal; nothing elsewhere."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Phases:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def tick(self, phase: str, done: int, total: int) -> None:
        """Say how far a phase is."""
        if phase not in self._tasks:
            self._tasks[phase] = self.progress.add_task(phase, total=total)
        self.progress.update(self._tasks[phase], completed=done, total=total)
