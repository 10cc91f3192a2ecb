"""Terminal table of world models: how their graphs compare with the true ones."""

from __future__ import annotations

from rich.console import Console

from spartan.commands.terminal.tables import make_table
from spartan.commands.world.scores import WorldScores


def print_world(console: Console, table: WorldScores) -> None:
    """Print how the graphs of a world compare with the truth."""
    shown = make_table(
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
