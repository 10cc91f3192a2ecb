"""The phases of a compression: allocation, layers, distillation."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from spartan.budget import Budget
from spartan.methods.base import Method
from spartan.methods.fcpts import FCPTS
from spartan.methods.fixed import Fixed
from spartan.patterns import NM
from spartan.post_training.allocation import allocate
from spartan.post_training.base import LayerMethod
from spartan.post_training.best import combination
from spartan.post_training.distillation import Distillation, Trained, distil
from spartan.post_training.given import Given, kept_by
from spartan.post_training.layers import LayerResult, prune_layers
from spartan.post_training.network import Network
from spartan.post_training.pacing import steps_within
from spartan.post_training.request import Request


class Clock:
    """Adds up the seconds of phases."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._began = time.perf_counter()

    @property
    def total(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._began

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.phases[phase] = self.phases.get(phase, 0.0) + spent


@dataclass(frozen=True)
class Outcome:
    """What the phases did.

    Attributes:
        request: What was asked for, and what was chosen where nothing was.
        steps: Steps of the distillation.
        trained: What came of it; None if its weights were not taken.
        solved: Solutions of layers, by name.
    """

    request: Request
    steps: int = 0
    trained: Trained | None = None
    solved: dict[str, LayerResult] = dataclasses.field(default_factory=dict)


def run(network: Network, request: Request, clock: Clock) -> Outcome:
    """Allocate, prune and reconstruct: the copy in `network` is compressed then."""
    if request.method is None:
        request = _settle(network, request, clock)
    counts = None
    if not request.joint:
        with clock("allocation"):
            counts = allocate(network, request.allocation, _how_to_learn(network, request, clock))
    if isinstance(request.method, LayerMethod):
        assert counts is not None
        return _solve(network, request, request.method, counts, clock)
    assert request.method is not None
    return _train(network, request, request.method, counts, clock)


def _settle(network: Network, request: Request, clock: Clock) -> Request:
    """Choose the combination for the time there is."""
    steps = request.how.steps
    if request.minutes is not None:
        with clock("pacing"):
            left = 60 * request.minutes - clock.total
            steps = steps_within(network, FCPTS(), network.budget, request.how, left)
    method, allocation, reconstruct = combination(steps)
    if isinstance(network.pattern, NM):
        allocation = "uniform"
    how = dataclasses.replace(request.how, steps=steps)
    return Request(method, allocation, reconstruct, how, None)


def _how_to_learn(network: Network, request: Request, clock: Clock) -> Distillation:
    """Return how an allocation is learned: where time is short, in a quarter of it."""
    how = request.how
    if request.minutes is None or request.allocation != "learned":
        return how
    quarter = 15 * request.minutes - clock.total
    steps = steps_within(network, FCPTS(), network.budget, how, quarter)
    return dataclasses.replace(how, steps=4 * steps)


def _solve(
    network: Network, request: Request, method: LayerMethod, counts: list[int], clock: Clock
) -> Outcome:
    """Prune layer by layer; then perhaps distil with these masks."""
    with clock("layers"):
        solved = prune_layers(network, method, counts, request.reconstruct is not None)
    if request.reconstruct != "network":
        return Outcome(request, solved=solved)
    budget = network.budget
    if not isinstance(network.pattern, NM):
        kept = {name: result.units.float().mean() for name, result in solved.items()}
        budget = Budget(allocation={name: float(share) for name, share in kept.items()})
    steps, trained = _distil(network, request, Fixed(), budget, clock)
    return Outcome(request, steps, trained, solved)


def _train(
    network: Network, request: Request, method: Method, counts: list[int] | None, clock: Clock
) -> Outcome:
    """Let a method of training find masks during a distillation; then perhaps refit the layers."""
    budget = network.budget
    if isinstance(method, FCPTS) and request.joint:
        cap = min(method.max_layer_sparsity, network.max_layer_sparsity)
        method = dataclasses.replace(method, max_layer_sparsity=cap)
    elif counts is not None and not isinstance(network.pattern, NM):
        limits = network.limits
        pairs = zip(limits.names, counts, limits.units, strict=True)
        budget = Budget(allocation={name: k / n for name, k, n in pairs})
    steps, trained = _distil(network, request, method, budget, clock)
    if request.reconstruct == "network":
        return Outcome(request, steps, trained)
    with clock("layers"):
        given = Given(kept_by(network.targets, network.pattern))
        network.pruned.load_state_dict(network.dense.state_dict())
        kept = [int(units.sum()) for units in given.units.values()]
        solved = prune_layers(network, given, kept, request.reconstruct == "layer")
    return Outcome(request, steps, None, solved)


def _distil(
    network: Network, request: Request, method: Method, budget: Budget, clock: Clock
) -> tuple[int, Trained]:
    how = request.how
    with clock("distillation"):
        if request.minutes is not None:
            left = 60 * request.minutes - clock.total
            how = dataclasses.replace(how, steps=steps_within(network, method, budget, how, left))
        return how.steps, distil(network, network.pruned, method, budget, how)
