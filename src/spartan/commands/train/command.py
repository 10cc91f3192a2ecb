"""`spartan train`: trains a network to an exact budget, or goes on with a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from spartan.commands.images import load_data
from spartan.commands.models import require_trusted
from spartan.commands.options.files import read_options, refuse_changes
from spartan.commands.options.train import TrainConfig
from spartan.commands.report.page import write_page
from spartan.commands.runs.folder import Run
from spartan.commands.terminal.console import Terminal
from spartan.commands.terminal.display import Display
from spartan.commands.terminal.tables import print_layers
from spartan.commands.train.plan import print_plan
from spartan.commands.train.resuming import MAY_CHANGE
from spartan.commands.train.trainer import Trainer
from spartan.errors import ConfigError


@dataclass(frozen=True)
class Train:
    """Train a network to an exact budget."""

    options: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()
    """Every option of the run."""
    config: str | None = None
    """File with options (JSON, as in a run folder); options given here win."""
    resume: str | None = None
    """Run folder to continue."""
    dry_run: bool = False
    """Print layers, costs, budget and schedule, and stop."""
    trust: bool = False
    """Call the function that a run folder names as its model, if it is not a model of spartan, timm
    or transformers: whoever wrote the folder chooses what runs."""

    def file_options(self) -> TrainConfig | None:
        """Return the options that --config or --resume name, if one is given.

        Raises:
            ConfigError: Both are given, or the folder to resume is of another command.
        """
        if self.config is not None and self.resume is not None:
            raise ConfigError("Give --config or --resume, not both: a run is resumed with its own.")
        if self.config is not None:
            return read_options(TrainConfig, Path(self.config))
        if self.resume is None:
            return None
        saved = Run.open(Path(self.resume)).config()
        if not isinstance(saved, TrainConfig):
            raise ConfigError(f"{self.resume} is a compression: there is no training to resume.")
        return saved

    def run(self) -> int:
        """Run the command."""
        options = self.options
        if self.resume is not None:
            saved = self.file_options()
            assert saved is not None
            refuse_changes(saved, options, MAY_CHANGE)
            options = dataclasses.replace(options, out=self.resume)
            require_trusted(options.model, self.resume, self.trust)
        if options.teacher is not None and Path(options.teacher).is_dir():
            taught = Run.open(Path(options.teacher)).config().model
            require_trusted(taught, options.teacher, self.trust)
        if self.dry_run:
            print_plan(Terminal(), Trainer(options, load_data(options.data, options.image_size)))
            return 0
        return _train(options, self.resume is not None)


def _train(config: TrainConfig, resume: bool) -> int:
    console = Terminal()
    if not resume:
        Run(Path(config.out)).refuse_existing()
    trainer = Trainer(config, load_data(config.data, config.image_size))
    if resume:
        run = Run.open_to_continue(Path(config.out))
        if run.checkpoint_path.exists():
            trainer.load(run)
        console.print(f"resuming {config.out} at step {trainer.step} of {trainer.total_steps}")
    else:
        run = Run.create(config)
    console.print(str(trainer.sparsifier.coverage), highlight=False, soft_wrap=True)
    with Display(console, trainer.total_steps, trainer.step) as display:
        row = trainer.fit(run, display.show, display.tick)
    write_page([run], run.report_path)
    print_layers(console, run)
    console.print(
        f"test accuracy {row['accuracy']:.2%}, loss {row['loss']:.4f}\n"
        f"model  {run.model_path}\nreport {run.report_path}",
        highlight=False,
    )
    return 0
