"""The commands of `spartan`: parsing and printing; the work is done elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from spartan.cli_adapt import adapt
from spartan.cli_compress import compress
from spartan.cli_deploy import deploy_commands
from spartan.cli_options import paths_named_by, refuse_changes
from spartan.cli_world import run_world_command
from spartan.deploy import accelerate
from spartan.errors import ConfigError
from spartan.report.facts import read_facts
from spartan.report.inspection import inspect_file
from spartan.report.page import write_page
from spartan.report.table import print_inspection, print_layers, print_methods, print_plan
from spartan.training.config import TrainConfig, read_config
from spartan.training.data import load_data
from spartan.training.display import Display
from spartan.training.opening import open_model
from spartan.training.run import Run
from spartan.training.trainer import Trainer, evaluate, pick_device

# Options that may change when a run is resumed: where and how it is computed, not what.
_MAY_CHANGE = {"device", "workers", "out"}


def run_command(words: Sequence[str]) -> int:
    """Parse a command line, run its command and return the exit code."""
    if words[:1] == ["world"]:
        return run_world_command(words[1:])
    start, resumed = _defaults(words)

    def train(
        options: Annotated[TrainConfig, tyro.conf.arg(name="")] = start,
        config: str | None = None,
        resume: str | None = None,
        dry_run: bool = False,
    ) -> int:
        """Train a network to an exact budget.

        Args:
            options: Every option of the run.
            config: File with options (JSON, as in a run folder); options given here win.
            resume: Run folder to continue.
            dry_run: Print layers, costs, budget and schedule, and stop.
        """
        if resume is not None:
            refuse_changes(resumed, options, _MAY_CHANGE)
            options = dataclasses.replace(options, out=resume)
        return _dry_run(options) if dry_run else _train(options, resume is not None)

    def evaluate_run(
        run: tyro.conf.Positional[Path],
        device: str = "auto",
        weights: Path | None = None,
        accelerated: bool = False,
    ) -> int:
        """Measure a run's model on its held-out images.

        Args:
            run: Run folder.
            device: auto, cpu, cuda, …
            weights: Safetensors file to use instead of the run's own, packed or not.
            accelerated: Run the sparse layers on sparse kernels.
        """
        return _evaluate(run, device, weights, accelerated)

    def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> int:
        """Print what runs reached, layer by layer, and write an HTML page.

        Args:
            runs: One or more run folders; several are shown side by side.
            out: Page to write; by default report.html in the run folder, or here for several.
        """
        return _report(runs, out)

    def inspect(file: tyro.conf.Positional[Path]) -> int:
        """Print density and size of every tensor of a safetensors file or torch checkpoint.

        Args:
            file: The file.
        """
        return _inspect(file)

    def methods() -> int:
        """Print every method: when to choose it, its paper, and what it costs per step."""
        print_methods(Console())
        return 0

    def world() -> int:
        """Learn which object influences which: train, evaluate, adapt, show; see world --help."""
        return run_world_command(["--help"])

    commands: dict[str, Callable[..., int]] = {
        "train": train,
        "evaluate": evaluate_run,
        "report": report,
        "inspect": inspect,
        "methods": methods,
        "compress": compress,
        "adapt": adapt,
        "world": world,
        **deploy_commands(),
    }
    code: int = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="spartan",
        description="Train, prune and ship networks at an exact sparsity.",
        args=words,
    )
    return code


def _defaults(words: Sequence[str]) -> tuple[TrainConfig, TrainConfig]:
    """Return what options default to: a config file, the resumed run, or the built-in values."""
    config, resume = paths_named_by(words, "--config", "--resume")
    if config is not None and resume is not None:
        raise ConfigError("Give --config or --resume, not both: a run is resumed with its own.")
    if resume is not None:
        saved = Run.open(resume).config()
        if not isinstance(saved, TrainConfig):
            raise ConfigError(f"{resume} is a compression: there is no training to resume.")
        return saved, saved
    start = read_config(config) if config is not None else TrainConfig()
    return start, start


def _train(config: TrainConfig, resume: bool) -> int:

    console = Console()
    if not resume:
        Run(Path(config.out)).refuse_existing()
    trainer = Trainer(config, load_data(config.data, config.image_size))
    if resume:
        run = Run.open(Path(config.out))
        if run.checkpoint_path.exists():
            trainer.load(run)
        console.print(f"resuming {config.out} at step {trainer.step} of {trainer.total_steps}")
    else:
        run = Run.create(config)
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


def _dry_run(config: TrainConfig) -> int:

    print_plan(Console(), Trainer(config, load_data(config.data, config.image_size)))
    return 0


def _evaluate(folder: Path, device_name: str, weights: Path | None, accelerated: bool) -> int:

    run = Run.open(folder)
    config = run.config()
    facts = read_facts(run)
    if not facts.images:
        raise ConfigError(f"{str(folder)!r} was not calibrated with images: none can be tested.")
    # Sparse kernels run on the CPU.
    device = pick_device("cpu" if accelerated else device_name)
    data = load_data(config.data, config.image_size)
    model, _ = open_model(str(folder), weights, None, len(data.classes))
    state = model.state_dict()
    kept = sum(int(state[layer.name].count_nonzero()) for layer in facts.layers)
    if accelerated:
        example = torch.zeros(config.batch_size, data.channels, data.size, data.size)
        model = accelerate(model, example, verbose=False)
    tested = facts.normalize_like(data)
    loss, accuracy = evaluate(model.to(device), data.test, tested, device, config.workers)
    source = folder if weights is None else weights
    Console().print(
        f"{source}: step {facts.step} of {facts.total_steps}, accuracy {accuracy:.2%}, "
        f"loss {loss:.4f}, density {kept / facts.numel:.4%} ({kept:,} of {facts.numel:,} "
        "prunable weights)",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _report(folders: tuple[Path, ...], out: Path | None) -> int:

    if not folders:
        raise ConfigError("Give at least one run folder.")
    runs = [Run.open(folder) for folder in folders]
    console = Console()
    for run in runs:
        print_layers(console, run)
    path = out or (runs[0].report_path if len(runs) == 1 else Path("report.html"))
    write_page(runs, path)
    console.print(f"report {path}", highlight=False, soft_wrap=True)
    return 0


def _inspect(file: Path) -> int:

    print_inspection(Console(), inspect_file(file))
    return 0
