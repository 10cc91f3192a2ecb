"""Training several models of one world one after the other, in a folder that can be resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from spartan.commands.accuracy import pick_device
from spartan.commands.options.files import (
    command_of,
    from_json,
    read_options,
    refuse_changes,
    to_json,
)
from spartan.commands.options.world import WorldConfig
from spartan.commands.runs.folder import Run
from spartan.commands.runs.interrupt import InterruptedRunError, SignalGuard
from spartan.commands.runs.metrics import MetricsLog
from spartan.errors import ConfigError, FileError, StateError
from spartan.files import load_state, save_state
from spartan.seeds import derive_seed
from spartan.world_model.baselines import GlobalGraph, NearestObjects
from spartan.world_model.constraints import EdgeBudget, ErrorBudget
from spartan.world_model.environments import Environment, make_environment
from spartan.world_model.files import load_model, save_model
from spartan.world_model.learning import Learner, measure
from spartan.world_model.model import TransitionModel, WorldModel
from spartan.world_model.refining import Refiner
from spartan.world_model.transitions import Transitions

Tick = Callable[[str, int, int], None]
MAY_CHANGE = {"device", "out"}  # of the options, when a run is resumed
_HELD_OUT = 6_000  # transitions
_POOL = 3  # times as many are simulated, so that few of the rare ones are drawn twice
_ROWS = 250  # of metrics, for each model
# Parts of the steps for models that need fewer: they have little to learn, or only a graph.
_SHARES = {"identity": 0.25, "nearest": 0.5, "global": 0.5}


class WorldRun:
    """The folder of a world model: `config.json`, one file for each model, metrics and report.

    Args:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self.run = Run(folder)
        self.folder = folder
        self.results_path = folder / "results.json"
        self.animation_path = folder / "world.gif"

    @classmethod
    def create(cls, config: WorldConfig) -> WorldRun:
        """Start a new folder.

        Raises:
            ConfigError: It already holds a run.
            FileError: It cannot be made.
        """
        world = cls(Path(config.out))
        Run.create(config)
        return world

    @classmethod
    def open(cls, folder: Path) -> tuple[WorldRun, WorldConfig]:
        """Open an existing folder.

        Raises:
            FileError: There is none, or it is damaged.
            ConfigError: Another command wrote it.
        """
        world = cls(folder)
        path = world.run.config_path
        if not path.is_file():
            raise FileError(f"{str(folder)!r} holds no world model: it has no config.json.")
        if command_of(path) != WorldConfig.command:
            raise ConfigError(f"{str(folder)!r} was not written by `spartan world train`.")
        return world, read_options(WorldConfig, path)

    def model_path(self, name: str) -> Path:
        """Where a finished model is."""
        return self.folder / f"{name}.safetensors"

    def model(self, name: str = "sparse") -> WorldModel:
        """Load a finished model.

        Raises:
            FileError: It is not there yet, or damaged.
        """
        path = self.model_path(name)
        if not path.is_file():
            raise FileError(
                f"{str(self.folder)!r} has no {name} model yet: continue the training with "
                f"`spartan world train --resume {self.folder}`."
            )
        return load_model(path)


class WorldJob:
    """Trains a fully connected model, one without interaction, the sparse one, and baselines.

    Args:
        config: Options.
    """

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self.environment = make_environment(config.env)
        self.device = pick_device(config.device)
        self.held_out = sample_transitions(self.environment, _HELD_OUT, config.seed, "held out").to(
            self.device
        )
        self.names = ["dense", "identity"]
        self.names += ["unrefined", "sparse"] if config.refine_steps else ["sparse"]
        self.names += ["nearest", "global"] if config.baselines else []

    @cached_property
    def data(self) -> Transitions:
        """Transitions for training; none are simulated to score a finished run."""
        data = sample_transitions(
            self.environment, self.config.transitions, self.config.seed, "train"
        )
        return data.to(self.device)

    def fit(self, world: WorldRun, tick: Tick, say: Callable[[str], None]) -> None:
        """Train what is not trained yet.

        Raises:
            InterruptedRunError: A signal came; a checkpoint is written.
            WorldError: The error allowed is met without any graph.
        """
        saved = _checkpoint(world, self.config)
        finished = [name for name in self.names if world.model_path(name).is_file()]
        done = sum(self.steps_of(name) for name in finished)
        if saved is not None and saved["name"] not in finished:
            done += saved["learner"]["step"]
        total = sum(self.steps_of(name) for name in self.names)
        log = MetricsLog(world.run, done, total + 1)
        try:
            with SignalGuard() as guard:
                for name in self.names:
                    if world.model_path(name).is_file():
                        continue
                    if self._refines(name):
                        say("closing what no state needs, to refine by; this can take minutes")
                    learner = self._learner(world, name)
                    if saved is not None and saved["name"] == name:
                        _continue(learner, saved["learner"], world)
                    self._train(world, name, learner, log, tick, guard)
                    save_model(world.model_path(name), learner.model)
                    world.run.checkpoint_path.unlink(missing_ok=True)
                    error, edges = measure(learner.model, self.held_out)
                    say(f"{name:9} error {error:.4f}  edges {edges:.2f}")
                    if guard.received is not None and name != self.names[-1]:
                        raise _stopped(world, f"the {name} model was done", guard.received)
        finally:
            log.close()

    def budget(self, world: WorldRun) -> ErrorBudget | EdgeBudget:
        """Return the sparse model's budget, once the models are there that it is measured by.

        Raises:
            WorldError: It is met without any graph.
        """
        errors = {
            name: measure(world.model(name).to(self.device), self.held_out)[0]
            for name in ("dense", "identity")
        }
        budget = self.config.budget(errors["dense"])
        if isinstance(budget, ErrorBudget):
            budget.check(errors["identity"])
        return budget

    def _learner(self, world: WorldRun, name: str) -> Learner:
        config = self.config
        torch.manual_seed(derive_seed(config.seed, f"world/{name}", 0))
        model: WorldModel
        if name == "global":
            model = GlobalGraph(config.model_config("sparse"), self.environment.objects)
        elif name == "nearest":
            model = NearestObjects(config.model_config("dense"))
        elif name == "identity":
            model = TransitionModel(config.model_config("identity"))
        else:
            model = TransitionModel(config.model_config("dense" if name == "dense" else "sparse"))
        model.fit_scale(self.data)
        recipe = dataclasses.replace(config.recipe(), steps=self.steps_of(name))
        known = self.data, self.held_out, recipe
        if name not in ("sparse", "unrefined", "global"):
            return Learner(model.to(self.device), *known, seed=config.seed)
        budget = self.budget(world)
        if self._refines(name):
            assert isinstance(budget, ErrorBudget)
            model.load_state_dict(world.model("unrefined").state_dict())
            return Refiner(
                model.to(self.device), *known, budget, config.refine_price, seed=config.seed
            )
        if name != "global":
            # Gates that open at random hide what depends on what, until the dynamics are known.
            model.load_state_dict(world.model("dense").state_dict())
        return Learner(model.to(self.device), *known, budget, config.seed)

    def _refines(self, name: str) -> bool:
        return name == "sparse" and self.config.refine_steps > 0

    def steps_of(self, name: str) -> int:
        """Return the steps that one of the models is trained for."""
        if self._refines(name):
            return self.config.refine_steps
        return max(1, round(self.config.steps * _SHARES.get(name, 1.0)))

    def _train(
        self,
        world: WorldRun,
        name: str,
        learner: Learner,
        log: MetricsLog,
        tick: Tick,
        guard: SignalGuard,
    ) -> None:
        steps = learner.recipe.steps
        every = max(1, steps // _ROWS)
        before = sum(self.steps_of(earlier) for earlier in self.names[: self.names.index(name)])
        while not learner.done:
            row = learner.advance()
            if learner.checks_now:
                row |= learner.check()
            if learner.step % every == 0 or learner.checks_now:
                log.write({"split": name, "step": before + learner.step, **row})
            if (learner.checks_now and not learner.done) or guard.received is not None:
                _save(world, self.config, name, learner)
            if guard.received is not None:
                where = f"step {learner.step} of {steps} of the {name} model"
                raise _stopped(world, where, guard.received)
            tick(name, learner.step, steps)
        learner.finish()


def sample_transitions(
    environment: Environment, count: int, seed: int, purpose: str
) -> Transitions:
    """Simulate transitions of the interventions for training, half of them with events."""
    generator = torch.Generator().manual_seed(derive_seed(seed, f"world/{purpose}", 0))
    natural = draw_natural(environment, _POOL * count, generator)
    return natural.balanced(generator)[slice(0, None, _POOL)]


def draw_natural(environment: Environment, count: int, generator: torch.Generator) -> Transitions:
    """Simulate transitions of the interventions for training, as they come."""
    length = environment.episode
    return environment.collect(count // length, length, range(environment.seen), generator)


def _stopped(world: WorldRun, where: str, signum: int) -> InterruptedRunError:
    return InterruptedRunError(
        f"Stopped after {where}. To continue: spartan world train --resume {world.folder}", signum
    )


def _checkpoint(world: WorldRun, config: WorldConfig) -> Any:
    path = world.run.checkpoint_path
    if not path.is_file():
        return None
    state = load_state(path)
    if not isinstance(state, dict) or {"name", "learner"} - set(state):
        raise FileError(f"{str(path)!r} is not a checkpoint of a world model.")
    if "options" in state:
        refuse_changes(
            from_json(WorldConfig, state["options"], "the checkpoint"), config, MAY_CHANGE
        )
    return state


def _save(world: WorldRun, config: WorldConfig, name: str, learner: Learner) -> None:
    state = {"name": name, "learner": learner.state_dict(), "options": to_json(config)}
    save_state(world.run.checkpoint_path, state)


def _continue(learner: Learner, state: dict[str, Any], world: WorldRun) -> None:
    try:
        learner.load_state_dict(state)
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        path = str(world.run.checkpoint_path)
        raise StateError(f"{path!r} does not fit the options: {error}") from error
