"""`spartan world`: train, evaluate, adapt and show models of which object influences which."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from spartan.commands.options.files import refuse_changes
from spartan.commands.options.world import WorldConfig
from spartan.commands.terminal.console import Terminal
from spartan.commands.terminal.display import Phases
from spartan.commands.world.job import MAY_CHANGE, WorldJob, WorldRun
from spartan.commands.world.page import animate, write_world_page
from spartan.commands.world.printing import print_world
from spartan.commands.world.scores import HORIZON, score_world
from spartan.errors import ConfigError, did_you_mean
from spartan.files import save_tensors, write_text
from spartan.seeds import derive_seed
from spartan.world_model.adaptation import adapt
from spartan.world_model.drawing import save_animation
from spartan.world_model.environments import Environment, make_environment
from spartan.world_model.metrics import normalised_error, rollout_error
from spartan.world_model.model import TransitionModel


@dataclass(frozen=True)
class TrainWorld:
    """Train a world model under a budget, and those it is compared with."""

    options: Annotated[WorldConfig, tyro.conf.arg(name="")] = WorldConfig()
    """Every option of the run."""
    resume: str | None = None
    """Run folder to continue."""

    def file_options(self) -> WorldConfig | None:
        """Return the options of the run to resume, if one is named."""
        return None if self.resume is None else WorldRun.open(Path(self.resume))[1]

    def run(self) -> int:
        """Run the command."""
        options, saved = self.options, self.file_options()
        if self.resume is not None and saved is not None:
            refuse_changes(saved, options, MAY_CHANGE)
            if options.out not in (saved.out, self.resume):
                raise ConfigError("Give --resume or --out, not both: a run goes on where it is.")
            options = dataclasses.replace(options, out=self.resume)
        return _train(options, self.resume is not None)


@dataclass(frozen=True)
class EvaluateWorld:
    """Score a run's models again, on states drawn from another seed."""

    folder: tyro.conf.Positional[Path]
    """Run folder."""
    seed: int = 1000
    """Of the states."""

    def run(self) -> int:
        """Run the command."""
        world, config = WorldRun.open(self.folder)
        job = WorldJob(dataclasses.replace(config, device="cpu"))
        print_world(Terminal(), score_world(job, world, self.seed))
        return 0


@dataclass(frozen=True)
class AdaptWorld:
    """Fit the token of an unseen intervention to a few trajectories; no weight changes."""

    folder: tyro.conf.Positional[Path]
    """Run folder."""
    intervention: str | None = None
    """Its name or number; by default the first that training did not see."""
    trajectories: int = 5
    """How many are there to fit to."""
    length: int = 20
    """Steps of each."""
    seed: int = 0
    """Of the trajectories."""

    def run(self) -> int:
        """Run the command."""
        return _adapt(self.folder, self.intervention, self.trajectories, self.length, self.seed)


@dataclass(frozen=True)
class ShowWorld:
    """Draw a trajectory with its graphs as a GIF: the true one and, of a run, the one found."""

    folder: tyro.conf.Positional[Path | None] = None
    """Run folder; without it, give --env."""
    env: str | None = None
    """particles, pong, balls, create: only the true graph is drawn."""
    intervention: str | None = None
    """Its name or number."""
    steps: int = 60
    """Frames."""
    seed: int = 0
    """Of the trajectory."""
    out: Path | None = None
    """File to write."""

    def run(self) -> int:
        """Run the command."""
        return _show(self.folder, self.env, self.intervention, self.steps, self.seed, self.out)


WORLD_COMMANDS: dict[str, Any] = {
    "train": TrainWorld,
    "evaluate": EvaluateWorld,
    "adapt": AdaptWorld,
    "show": ShowWorld,
}


def _train(config: WorldConfig, resume: bool) -> int:
    console = Terminal()
    job = WorldJob(config)
    world = WorldRun.open(Path(config.out))[0] if resume else WorldRun.create(config)
    if resume:
        world.run.hold()

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
    console = Terminal()
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
    Terminal().print(f"animation {path}", highlight=False, soft_wrap=True)
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
