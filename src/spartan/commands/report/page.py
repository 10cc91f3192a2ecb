"""HTML report of one or several training or compression runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spartan.commands.pages.rendering import write_rendered
from spartan.commands.report import figures
from spartan.commands.runs.facts import RunFacts, read_facts
from spartan.commands.runs.folder import Run


def write_page(runs: Sequence[Run], path: Path) -> None:
    """Write the report of one or several runs.

    Raises:
        FileError: A run has nothing saved yet, or the page cannot be written.
    """
    facts = [read_facts(run) for run in runs]
    charts, options = _charts(facts), _options(facts)
    write_rendered(path, "report/page.html.j2", runs=facts, charts=charts, options=options)


def _charts(runs: Sequence[RunFacts]) -> list[tuple[str, str, str]]:
    """Return (title, explanation, SVG) of each picture."""
    one = len(runs) == 1
    trained = any(run.compression is None for run in runs)
    charts = []
    if trained:
        note = "Held-out images; training batches faint."
        charts.append(("Accuracy", note, figures.accuracy(runs)))
    if any(run.series("train", "loss")[0] for run in runs):
        note = (
            "Held-out images; training batches faint. Of compressions: divergence from the dense "
            "network, on calibration samples."
        )
        charts.append(("Loss", note, figures.loss(runs)))
        note = (
            "Fraction of the prunable weights kept. Where there are any: the expected density of "
            "gates and the fraction that growth has ever tried, faint, and β of the soft mask, "
            "dashed."
        )
        charts.append(("Density and sharpness", note, figures.schedule(runs)))
    if trained:
        note = (
            "Units that entered or left the mask between two points, of all units; of growth: new "
            "connections, of all connections."
        )
        charts.append(("Mask churn", note, figures.churn(runs)))
    note = "Counted in the saved tensors."
    charts.append(("Density of each layer", note, figures.densities(runs)))
    if any(run.solved for run in runs):
        note = (
            "Relative squared error of each layer's outputs on calibration data after it was "
            "solved, before any distillation, with what the pruned layers before it give."
        )
        charts.append(("Error of each layer", note, figures.errors(runs)))
    for run in runs:
        title = "Weights" if one else f"Weights of {run.name}"
        note = "Distribution of the nonzero weights, each layer scaled to its own peak."
        charts.append((title, note, figures.histograms(run)))
    return charts


def _options(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    """Return each option with its value in every run; for several runs those that differ first."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [(key, [_plain(run.config.get(key)) for run in runs]) for key in keys]
    return sorted(rows, key=lambda row: len(set(row[1])) == 1)


def _plain(value: object) -> str:
    if isinstance(value, tuple | list):
        return " ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
