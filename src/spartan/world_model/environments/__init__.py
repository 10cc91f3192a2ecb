"""Simulated worlds that return the true influence graph of every step."""

from spartan.errors import WorldError, did_you_mean
from spartan.world_model.environments.balls import BouncingBalls
from spartan.world_model.environments.base import Environment, Shape, Step
from spartan.world_model.environments.create import CreateLite
from spartan.world_model.environments.particles import GatedParticles
from spartan.world_model.environments.pong import PongState

ENVIRONMENTS: dict[str, type[Environment]] = {
    environment.name: environment
    for environment in (GatedParticles, PongState, BouncingBalls, CreateLite)
}


def make_environment(name: str) -> Environment:
    """Create an environment by its name.

    Raises:
        WorldError: There is none of this name.
    """
    if name not in ENVIRONMENTS:
        raise WorldError(f"Unknown environment {name!r}; {did_you_mean(name, ENVIRONMENTS)}")
    return ENVIRONMENTS[name]()


__all__ = [
    "ENVIRONMENTS",
    "BouncingBalls",
    "CreateLite",
    "Environment",
    "GatedParticles",
    "PongState",
    "Shape",
    "Step",
    "make_environment",
]
