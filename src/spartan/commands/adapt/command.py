"""`spartan adapt`: trains small adapters on a frozen pretrained transformer."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from spartan.commands.adapt.job import Adapted, open_adapt_job, train_adapter
from spartan.commands.adapt.page import write_adapting_page
from spartan.commands.adapt.printing import print_adapted
from spartan.commands.options.adapt import AdaptConfig
from spartan.commands.options.files import to_json
from spartan.commands.runs.folder import Run
from spartan.commands.terminal.console import Terminal
from spartan.commands.terminal.display import Phases
from spartan.files import write_text


@dataclass(frozen=True)
class Adapt:
    """Train small adapters on a frozen pretrained transformer; several are compared."""

    options: Annotated[AdaptConfig, tyro.conf.arg(name="")]
    """Every option of the adaptation."""

    def run(self) -> int:
        """Run the command."""
        options = self.options
        console = Terminal()
        folder = Path(options.out)
        Run(folder).refuse_existing()
        job = open_adapt_job(options)
        Run(folder).hold_new()
        console.print(
            f"{len(job.data.train):,} texts of {len(job.data.classes)} classes, "
            f"{len(job.data.test):,} held out",
            highlight=False,
        )
        adapted: list[Adapted] = []
        with Phases(console) as phases:
            for name in options.adapter:
                adapted.append(train_adapter(options, job, name, folder / name, phases.tick))
                _write(folder, options, adapted, job.data.classes)
        print_adapted(console, adapted)
        console.print(
            f"adapters {', '.join(str(folder / one.name) for one in adapted)}\n"
            f"report   {folder / 'report.html'}",
            highlight=False,
            soft_wrap=True,
        )
        return 0


def _write(folder: Path, options: AdaptConfig, adapted: list[Adapted], classes: list[str]) -> None:
    """Write what has been reached so far; before the first result, the folder holds none."""
    write_text(folder / "config.json", to_json(options))
    results = [
        {
            **{k: v for k, v in vars(one).items() if k != "specializations"},
            "specializations": {
                layer: {"bits": found.bits, "by_chance": found.by_chance, "p": found.p,
                        "shares": found.shares.tolist()}
                for layer, found in one.specializations.items()
            },
        }
        for one in adapted
    ]  # fmt: skip
    text = json.dumps({"classes": classes, "adapters": results}, indent=1) + "\n"
    write_text(folder / "results.json", text)
    values = dataclasses.asdict(options)
    write_adapting_page(adapted, classes, values, folder / "report.html")
