"""The options of `spartan world train`, as the command line and config.json hold them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from spartan.errors import ConfigError, WorldError
from spartan.world_model.attention import Normalise
from spartan.world_model.constraints import EdgeBudget, ErrorBudget
from spartan.world_model.environments import make_environment
from spartan.world_model.learning import Recipe
from spartan.world_model.model import Mode, TokenLayers, TransitionConfig


@dataclass(frozen=True)
class WorldConfig:
    """Options of one world model and of those it is compared with."""

    command: ClassVar[str | None] = "world"

    env: str = "particles"
    """particles, pong, balls, create."""
    tau_factor: float = 1.0
    """The error allowed, in multiples of the fully connected model's."""
    error: float | None = None
    """The error allowed, in itself: mean square, in units of the usual change."""
    edges: float | None = None
    """Instead of an error: edges between objects allowed in the mean of all states."""
    steps: int = 16_000
    """Batches; half of them for the baselines, a quarter for the model without interaction."""
    refine_steps: int = 0
    """Further batches in which the gates learn from backward elimination which of them are needed;
    12000 help in create. Goes with an error, not with --edges."""
    refine_price: float = 0.03
    """What a gate must be worth then, of a state's error; more gives fewer edges."""
    batch_size: int = 128
    """Transitions of a batch."""
    lr: float = 1e-3
    """Adam's learning rate, falling to 0 in the last 60 % of steps."""
    transitions: int = 200_000
    """Simulated transitions to train on."""
    width: int = 64
    """Features of a token."""
    layers: int = 2
    """Layers of gated attention."""
    hidden: int = 128
    """Units of each hidden layer."""
    frequencies: int = 0
    """Sines and cosines of each feature that tokens are made of, too; 4 helps where thresholds
    decide, as in pong."""
    normalise: Normalise = "open"
    """Attention sums to 1 over open gates; dense, as published, over all."""
    token_layers: TokenLayers = "all"
    """Layers in which the intervention is read: all, as published; last, for adapting to several
    known interventions at once."""
    baselines: bool = True
    """Train the global graph and the nearest-object attention, too, to compare with."""
    seed: int = 0
    """Decides data, weights, batches and gates."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1."""
    out: str = "runs/world"
    """Folder to write."""

    def __post_init__(self) -> None:
        try:
            environment = make_environment(self.env)
            self.recipe()
            self.model_config("sparse")
        except WorldError as error:
            raise ConfigError(str(error)) from error
        if self.refine_steps < 0:
            raise ConfigError(f"--refine-steps {self.refine_steps} must not be negative.")
        if self.refine_steps and self.edges is not None:
            raise ConfigError("--refine-steps goes with an error allowed, not with --edges.")
        if self.error is not None and self.edges is not None:
            raise ConfigError("Give --error or --edges, not both.")
        for name in ("tau_factor", "error", "edges", "lr", "refine_price"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be positive.")
        most = environment.objects * (environment.objects - 1)
        if self.edges is not None and self.edges >= most:
            raise ConfigError(f"--edges {self.edges}: there are never more than {most}.")
        least = environment.episode * environment.seen
        if self.transitions < least:
            raise ConfigError(f"--transitions {self.transitions}: at least {least} are needed.")

    def recipe(self) -> Recipe:
        """Return how each model is trained."""
        return Recipe(steps=self.steps, batch_size=self.batch_size, lr=self.lr)

    def model_config(self, mode: Mode) -> TransitionConfig:
        """Return the sizes of a model."""
        environment = make_environment(self.env)
        return TransitionConfig(
            features=len(environment.features),
            changing=environment.changing,
            environments=environment.seen,
            width=self.width,
            layers=self.layers,
            hidden=self.hidden,
            frequencies=self.frequencies,
            mode=mode,
            normalise=self.normalise,
            token_layers=self.token_layers,
        )

    def budget(self, dense_error: float) -> ErrorBudget | EdgeBudget:
        """Return the constraint, given the error of the fully connected model."""
        if self.edges is not None:
            return EdgeBudget(self.edges)
        allowed = self.tau_factor * dense_error if self.error is None else self.error
        return ErrorBudget(allowed)
