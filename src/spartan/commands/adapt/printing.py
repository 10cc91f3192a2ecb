"""Terminal table of adapters: accuracy, trained parameters, bytes, examples per second."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from spartan.commands.adapt.job import Adapted
from spartan.commands.terminal.tables import make_table


def print_adapted(console: Console, adapted: Sequence[Adapted]) -> None:
    """Print what adapters reached."""
    columns = ("accuracy", "loss", "trained", "bytes", "training, texts/s", "inference, texts/s")
    table = make_table("adapters", "adapter", *columns)
    for one in adapted:
        table.add_row(
            one.name,
            f"{one.accuracy:.2%}",
            f"{one.loss:.4f}",
            f"{one.parameters:,}",
            f"{one.bytes:,}",
            f"{one.train_per_second:.1f}",
            f"{one.infer_per_second:.1f}",
        )
    console.print(table)
