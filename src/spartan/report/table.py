"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from spartan import kernels, methods, post_training
from spartan.adapters import ADAPTERS
from spartan.described import Described
from spartan.report.facts import read_facts
from spartan.report.inspection import FileFacts
from spartan.training.adapting import Adapted
from spartan.training.run import Run
from spartan.training.trainer import Trainer
from spartan.training.world_scores import WorldScores


def print_layers(console: Console, run: Run) -> None:
    """Print what each layer of a run keeps, counted in the saved tensors."""
    facts = read_facts(run)
    table = _table(f"{facts.name}: what is not zero", "weight", "shape", "kept", "of", "density")
    for layer in facts.layers:
        table.add_row(
            layer.name,
            _shape(layer.shape),
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


def print_methods(console: Console) -> None:
    """Print every method: when to choose it, what it costs, where it comes from."""
    for method in methods.list():
        _print_method(console, method, "adds")
    console.print("\nfor `spartan compress`, besides fcpts:", highlight=False)
    for solver in post_training.METHODS.values():
        if issubclass(solver, post_training.LayerMethod):
            _print_method(console, solver, "costs")
    console.print("\nfor `spartan adapt`:", highlight=False)
    for adapter in ADAPTERS.values():
        _print_method(console, adapter, "adds")


def print_adapted(console: Console, adapted: Sequence[Adapted]) -> None:
    """Print what adapters reached."""
    columns = ("accuracy", "loss", "trained", "bytes", "training, texts/s", "inference, texts/s")
    table = _table("adapters", "adapter", *columns)
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


def _print_method(console: Console, method: type[Described], verb: str) -> None:
    source = f"; {method.paper}" if method.paper else ""
    console.print(
        f"[bold]{method.name:17}[/] {method.summary}\n{'':17} {verb} {method.step_cost}{source}",
        highlight=False,
        soft_wrap=True,
    )


def print_plan(console: Console, trainer: Trainer) -> None:
    """Print layers, costs, budget and schedule of a run that has not begun."""
    sparsifier = trainer.sparsifier
    table = _table("prunable weights", "weight", "shape", "weights", "units", "cost of a unit")
    for row in sparsifier.layers():
        table.add_row(
            row.name, _shape(row.shape), f"{row.numel:,}", f"{row.units:,}", f"{row.cost:.4g}"
        )
    console.print(table)
    for names, share in sparsifier.shares():
        unit = "units" if share.counted else "of cost"
        where = " in each row" if share.rows else ""
        console.print(
            f"budget  {names}: {share.kept:,.10g} of {share.total:,.10g} {unit}{where}",
            highlight=False,
        )
    total = trainer.total_steps
    method = sparsifier.method
    fixed = max((s for s in range(total + 1) if sparsifier.moves_after(s)), default=0)
    settings = ", ".join(f"{k}={v}" for k, v in method.settings().items() if k != "name")
    console.print(
        f"kernels {kernels.backend()}\n"
        f"method  {method.name} ({method.paper}; {method.summary})\n        {settings}\n"
        f"steps   {total:,} ({trainer.config.epochs} epochs of {trainer.steps_per_epoch:,}); masks "
        f"fixed from step {fixed:,} on",
        highlight=False,
    )
    end = next(s for s in range(total + 1) if sparsifier.progress_after(s) == 1.0)
    _, share = sparsifier.shares()[0]
    marks = sorted({round(end * quarter / 4) for quarter in range(5)})
    densities = [share.at(sparsifier.progress_after(step)) / share.total for step in marks]
    shown = ", ".join(f"step {s:,}: {d:.2%}" for s, d in zip(marks, densities, strict=True))
    console.print(f"density {shown}", highlight=False)


def print_inspection(console: Console, facts: FileFacts) -> None:
    """Print density and size of every tensor of a file."""
    table = _table(str(facts.path), "tensor", "shape", "dtype", "nonzero", "of", "density", "bytes")
    for t in facts.tensors:
        density = f"{t.nonzero / t.numel:.2%}" if t.numel else "-"
        table.add_row(
            t.name, _shape(t.shape), t.dtype, f"{t.nonzero:,}", f"{t.numel:,}", density,
            f"{t.bytes:,}",
        )  # fmt: skip
    nonzero, numel = (sum(getattr(t, k) for t in facts.tensors) for k in ("nonzero", "numel"))
    table.add_section()
    table.add_row(
        "all", "", "", f"{nonzero:,}", f"{numel:,}", f"{nonzero / numel:.2%}" if numel else "-",
        f"{sum(t.bytes for t in facts.tensors):,}",
    )  # fmt: skip
    console.print(table)
    console.print(f"file size {facts.bytes:,} bytes", highlight=False)


def print_world(console: Console, table: WorldScores) -> None:
    """Print how the graphs of a world compare with the truth."""
    shown = _table(
        "graphs against the truth",
        *("graphs read by", "error", "SHD", "+targets", "edges", "prec.", "recall", "events"),
    )
    for one in table.scores:
        graphs = one.graphs
        shown.add_row(
            one.name,
            "–" if one.error is None else f"{one.error:.4f}",
            f"{graphs.shd:.3f}",
            f"{graphs.shd_with_targets:.3f}",
            f"{graphs.edges:.2f}",
            f"{graphs.precision:.1%}",
            f"{graphs.recall:.1%}",
            f"{graphs.event_recall:.1%}",
        )
    console.print(shown)
    clear = table.scores[0].graphs.clear_shd
    if clear is not None:
        console.print(
            f"SPARTAN's SHD without pairs within a tenth of their edge's threshold: {clear:.3f}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"{table.verdict}\nof pairs without a path in SPARTAN's graph {table.influence_held:.3%} "
        f"have influence, {table.influence_free:.1%} where gates may open in response; "
        f"removing what has no path in it changes its error by {table.own_removal:.3%}",
        highlight=False,
        soft_wrap=True,
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        left = i == 0 or column in ("shape", "dtype")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
