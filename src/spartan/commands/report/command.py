"""`spartan report`: what runs reached, layer by layer, printed and as an HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from spartan.commands.report.page import write_page
from spartan.commands.runs.folder import Run
from spartan.commands.terminal.console import Terminal
from spartan.commands.terminal.tables import print_layers
from spartan.errors import ConfigError


@dataclass(frozen=True)
class Report:
    """Print what runs reached, layer by layer, and write an HTML page."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """One or more run folders; several are shown side by side."""
    out: Path | None = None
    """Page to write; by default report.html in the run folder, or here for several."""

    def run(self) -> int:
        """Run the command."""
        if not self.runs:
            raise ConfigError("Give at least one run folder.")
        runs = [Run.open(folder) for folder in self.runs]
        console = Terminal()
        for run in runs:
            print_layers(console, run)
        path = self.out or (runs[0].report_path if len(runs) == 1 else Path("report.html"))
        write_page(runs, path)
        console.print(f"report {path}", highlight=False, soft_wrap=True)
        return 0
