"""Tables for the terminal, and the one of what each layer keeps."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from spartan.commands.runs.facts import read_facts
from spartan.commands.runs.folder import Run


def print_layers(console: Console, run: Run) -> None:
    """Print what each layer of a run keeps, counted in the saved tensors."""
    facts = read_facts(run)
    table = make_table(
        f"{facts.name}: what is not zero", "weight", "shape", "kept", "of", "density"
    )
    for layer in facts.layers:
        table.add_row(
            layer.name,
            shape_of(layer.shape),
            f"{layer.nonzero:,}",
            f"{layer.numel:,}",
            f"{layer.density:.2%}",
        )
    kept, everything = facts.parameters
    table.add_section()
    table.add_row("prunable", "", f"{facts.kept:,}", f"{facts.numel:,}", f"{facts.density:.4%}")
    table.add_row("whole file", "", f"{kept:,}", f"{everything:,}", f"{kept / everything:.4%}")
    console.print(table)
    units, kept_units = (sum(getattr(x, k) for x in facts.layers) for k in ("units", "kept_units"))
    console.print(
        f"asked: {facts.asked} ({facts.config['cost']}, {facts.config['allocation']}, "
        f"{facts.config['pattern']}); reached: {kept_units:,} of {units:,} units",
        highlight=False,
        soft_wrap=True,
    )
    if "tried" in facts.monitor:
        console.print(f"of all pairs {facts.monitor['tried']:.4%} were ever tried", highlight=False)
    if "open" in facts.monitor:
        console.print(
            f"the gates alone had reached an expected density of {facts.monitor['expected']:.4%}, "
            f"with {facts.monitor['open']:.4%} mostly open",
            highlight=False,
            soft_wrap=True,
        )


def make_table(title: str, *columns: str) -> Table:
    """Return an empty table: names to the left, numbers to the right."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        left = i == 0 or column in ("shape", "dtype")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    return table


def shape_of(shape: tuple[int, ...]) -> str:
    """Return a shape as text."""
    return "x".join(map(str, shape)) or "scalar"
