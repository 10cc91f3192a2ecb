"""What a training run will do, printed before it begins: layers, costs, budget, schedule."""

from __future__ import annotations

from rich.console import Console

from spartan import kernels
from spartan.budgets.group_budget import RowBudget
from spartan.commands.terminal.tables import make_table, shape_of
from spartan.commands.train.trainer import Trainer


def print_plan(console: Console, trainer: Trainer) -> None:
    """Print layers, costs, budget and schedule of a run that has not begun."""
    sparsifier = trainer.sparsifier
    columns = ("weight", "shape", "weights", "units", "unit cost", "at least")
    table = make_table("prunable weights", *columns)
    for row in sparsifier.layers():
        table.add_row(
            row.name, shape_of(row.shape), f"{row.numel:,}", f"{row.units:,}", f"{row.cost:.4g}",
            f"{row.floor:,}",
        )  # fmt: skip
    console.print(table)
    console.print(str(sparsifier.coverage), highlight=False, soft_wrap=True)
    for names, budget in sparsifier.budgets():
        unit = "units" if budget.counted else "of cost"
        where = " in each row" if isinstance(budget, RowBudget) else ""
        console.print(
            f"budget  {names}: {budget.kept:,.10g} of {budget.total:,.10g} {unit}{where}",
            highlight=False,
        )
    total = trainer.total_steps
    method = sparsifier.method
    settings = ", ".join(f"{k}={v}" for k, v in method.settings().items() if k != "name")
    console.print(
        f"kernels {kernels.backend()}\n"
        f"method  {method.name} ({method.paper}; {method.summary})\n        {settings}\n"
        f"steps   {total:,} ({trainer.config.epochs} epochs of {trainer.steps_per_epoch:,}); masks "
        f"fixed from step {trainer.last_move:,} on",
        highlight=False,
    )
    end = next(s for s in range(total + 1) if sparsifier.progress_after(s) == 1.0)
    _, budget = sparsifier.budgets()[0]
    marks = sorted({round(end * quarter / 4) for quarter in range(5)})
    densities = [budget.at(sparsifier.progress_after(step)) / budget.total for step in marks]
    shown = ", ".join(f"step {s:,}: {d:.2%}" for s, d in zip(marks, densities, strict=True))
    console.print(f"density {shown}", highlight=False)
