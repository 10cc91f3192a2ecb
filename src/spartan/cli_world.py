"""The commands of `spartan world`: models that learn which object influences which."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from spartan.cli_options import paths_named_by, refuse_changes
from spartan.errors import ConfigError, did_you_mean
from spartan.files import save_tensors, write_text
from spartan.report.table import print_world
from spartan.report.world import animate, write_world_page
from spartan.seeds import derive_seed
from spartan.training.display import Phases
from spartan.training.world_config import WorldConfig
from spartan.training.world_scores import HORIZON, score_world
from spartan.training.worlds import WorldJob, WorldRun
from spartan.world_model.adaptation import adapt
from spartan.world_model.drawing import save_animation
from spartan.world_model.environments import Environment, make_environment
from spartan.world_model.metrics import normalised_error, rollout_error
from spartan.world_model.model import TransitionModel

# Options that may change when a run is resumed.
_MAY_CHANGE = {"device", "out"}


def run_world_command(words: Sequence[str]) -> int:
    """Parse the words after `spartan world`, run the command and return the exit code."""
    start = _resumed(words)

    def train(
        options: Annotated[WorldConfig, tyro.conf.arg(name="")] = start or WorldConfig(),  # noqa: B008
        resume: str | None = None,
    ) -> int:
        """Train a world model under a budget, and those it is compared with.

        Args:
            options: Every option of the run.
            resume: Run folder to continue.
        """
        if resume is not None and start is not None:
            refuse_changes(start, options, _MAY_CHANGE)
            if options.out not in (start.out, resume):
                raise ConfigError("Give --resume or --out, not both: a run goes on where it is.")
            options = dataclasses.replace(options, out=resume)
        return _train(options, resume is not None)

    def evaluate(run: tyro.conf.Positional[Path], seed: int = 1000) -> int:
        """Score a run's models again, on states drawn from another seed.

        Args:
            run: Run folder.
            seed: Of the states.
        """
        return _evaluate(run, seed)

    def adapt(
        run: tyro.conf.Positional[Path],
        intervention: str | None = None,
        trajectories: int = 5,
        length: int = 20,
        seed: int = 0,
    ) -> int:
        """Fit the token of an unseen intervention to a few trajectories; no weight changes.

        Args:
            run: Run folder.
            intervention: Its name or number; by default the first that training did not see.
            trajectories: How many are there to fit to.
            length: Steps of each.
            seed: Of the trajectories.
        """
        return _adapt(run, intervention, trajectories, length, seed)

    def show(
        run: tyro.conf.Positional[Path | None] = None,
        env: str | None = None,
        intervention: str | None = None,
        steps: int = 60,
        seed: int = 0,
        out: Path | None = None,
    ) -> int:
        """Draw a trajectory with its graphs as a GIF: the true one and, of a run, the one found.

        Args:
            run: Run folder; without it, give --env.
            env: particles, pong, balls, create: only the true graph is drawn.
            intervention: Its name or number.
            steps: Frames.
            seed: Of the trajectory.
            out: File to write.
        """
        return _show(run, env, intervention, steps, seed, out)

    commands: dict[str, Callable[..., int]] = {
        "train": train,
        "evaluate": evaluate,
        "adapt": adapt,
        "show": show,
    }
    code: int = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="spartan world",
        description="Learn which object influences which, in each state.",
        args=words,
    )
    return code


def _resumed(words: Sequence[str]) -> WorldConfig | None:
    """Return the options of the run to resume, if one is named."""
    (resume,) = paths_named_by(words, "--resume")
    return None if resume is None else WorldRun.open(resume)[1]


def _train(config: WorldConfig, resume: bool) -> int:
    console = Console()
    job = WorldJob(config)
    world = WorldRun.open(Path(config.out))[0] if resume else WorldRun.create(config)

    def say(line: str) -> None:
        console.print(line, highlight=False)

    with Phases(console) as phases:
        job.fit(world, phases.tick, say)
    table = score_world(job, world, config.seed)
    write_text(world.results_path, json.dumps(table.to_dict(), indent=1) + "\n")
    write_world_page(world, config, table)
    print_world(console, table)
    console.print(
        f"model     {world.model_path('sparse')}\n"
        f"animation {world.animation_path}\n"
        f"report    {world.run.report_path}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _evaluate(folder: Path, seed: int) -> int:
    world, config = WorldRun.open(folder)
    job = WorldJob(dataclasses.replace(config, device="cpu"))
    print_world(Console(), score_world(job, world, seed))
    return 0


def _adapt(folder: Path, named: str | None, count: int, length: int, seed: int) -> int:
    if min(count, length) < 1:
        raise ConfigError(f"--trajectories {count} and --length {length} must be at least 1.")
    world, config = WorldRun.open(folder)
    environment = make_environment(config.env)
    number = _intervention(environment, named, environment.seen)
    model = world.model("sparse")
    assert isinstance(model, TransitionModel)
    generator = torch.Generator().manual_seed(derive_seed(seed, "world/adapted", 0))
    given = environment.collect(count, length, [number], generator)
    tested = environment.collect(500, HORIZON, [number], generator)
    found = adapt(model, given, seed=seed)
    entries = model.codebook.detach()
    console = Console()
    name = environment.interventions[number]
    console.print(f"{name}, {len(given)} transitions; error of one step, of {HORIZON} steps")
    best = min(range(len(entries)), key=lambda i: normalised_error(model, given, entries[i]))
    rows = {
        "not adapted": entries[0],
        f"best known: {environment.interventions[best]}": entries[best],
        "adapted": found.token,
    }
    for title, token in rows.items():
        console.print(
            f"  {title:32} {normalised_error(model, tested, token):.4f}  "
            f"{rollout_error(model, tested, HORIZON, token):.3f}",
            highlight=False,
        )
    path = world.folder / f"token-{number}.safetensors"
    facts = {"intervention": name, "error": found.error, "start": found.start}
    save_tensors(path, {"token": found.token}, facts)
    frames = animate(environment, number, 60, seed, model, found.token)
    save_animation(path.with_suffix(".gif"), frames)
    console.print(
        f"token     {path}\nanimation {path.with_suffix('.gif')}", highlight=False, soft_wrap=True
    )
    return 0


def _show(
    folder: Path | None,
    env: str | None,
    named: str | None,
    steps: int,
    seed: int,
    out: Path | None,
) -> int:
    if (folder is None) == (env is None):
        raise ConfigError("Give a run folder, or --env, one of the two.")
    if steps < 1:
        raise ConfigError(f"--steps {steps} must be at least 1.")
    model = None
    if folder is not None:
        world, config = WorldRun.open(folder)
        environment, model = make_environment(config.env), world.model("sparse")
        path = out or world.animation_path
    else:
        environment = make_environment(str(env))
        path = out or Path(f"{env}.gif")
    number = _intervention(environment, named, 0)
    if model is not None and number >= environment.seen:
        raise ConfigError(
            f"{environment.interventions[number]!r} was not seen in training: fit its token with "
            f"`spartan world adapt {folder}`, which draws it, too."
        )
    save_animation(path, animate(environment, number, steps, seed, model))
    Console().print(f"animation {path}", highlight=False, soft_wrap=True)
    return 0


def _intervention(environment: Environment, named: str | None, default: int) -> int:
    names = environment.interventions
    if named is None:
        return default
    if named in names:
        return names.index(named)
    if named.isdecimal() and int(named) < len(names):
        return int(named)
    raise ConfigError(
        f"Unknown intervention {named!r}; numbers up to {len(names) - 1}, or "
        f"{did_you_mean(named, names)}"
    )
