"""The command of `spartan` that compresses a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from spartan.report.page import write_page
from spartan.report.table import print_layers
from spartan.training.compress_config import CompressConfig
from spartan.training.compression import open_job, run_job
from spartan.training.display import Phases
from spartan.training.run import Run


def compress(options: Annotated[CompressConfig, tyro.conf.arg(name="")]) -> int:
    """Prune a trained model to an exact sparsity, with unlabelled samples, in minutes.

    Args:
        options: Every option of the compression.
    """
    console = Console()
    Run(Path(options.out)).refuse_existing()
    job = open_job(options)
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
