"""`spartan compress`: prunes a trained model with unlabelled samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from spartan.commands.compress.job import open_job, run_job
from spartan.commands.options.compress import CompressConfig
from spartan.commands.report.page import write_page
from spartan.commands.runs.folder import Run
from spartan.commands.terminal.console import Terminal
from spartan.commands.terminal.display import Phases
from spartan.commands.terminal.tables import print_layers
from spartan.weights.coverage import coverage_of
from spartan.weights.prunable import find_prunable


@dataclass(frozen=True)
class Compress:
    """Prune a trained model to an exact sparsity, with unlabelled samples, in minutes."""

    options: Annotated[CompressConfig, tyro.conf.arg(name="")]
    """Every option of the compression."""
    trust: bool = False
    """Call the function that a run folder names as its model, if it is not a model of spartan, timm
    or transformers: whoever wrote the folder chooses what runs."""

    def run(self) -> int:
        """Run the command."""
        options = self.options
        console = Terminal()
        Run(Path(options.out)).refuse_existing()
        job = open_job(options, self.trust)
        prunable = find_prunable(job.model, options.include or None, options.exclude or None)
        console.print(str(coverage_of(job.model, prunable)), highlight=False, soft_wrap=True)
        with Phases(console) as phases:
            run, report = run_job(options, job, phases.tick)
        write_page([run], run.report_path)
        print_layers(console, run)
        times = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in report.phases.items())
        console.print(f"{report.seconds:.1f} s: {times}", highlight=False, soft_wrap=True)
        measured = [row for row in run.metrics() if row["split"] == "test"]
        if measured:
            before, after = (f"{row['accuracy']:.2%}" for row in (measured[0], measured[-1]))
            console.print(f"test accuracy {before} dense, {after} compressed", highlight=False)
        console.print(
            f"model  {run.model_path}\nreport {run.report_path}", highlight=False, soft_wrap=True
        )
        return 0
