"""Runs a compression: allocation, layer pruning, distillation; times each phase."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch.nn.modules.batchnorm import _BatchNorm

from spartan.budgets.budget import Budget
from spartan.example_inputs import tensors_of
from spartan.methods.masking.contract import MaskingMethod
from spartan.methods.masking.fcpts import FCPTS
from spartan.methods.masking.fixed import Fixed
from spartan.norms import recalibrated
from spartan.post_training.allocation import allocate
from spartan.post_training.compression_plan import CompressionPlan, combination
from spartan.post_training.distillation import Distillation, References, Trained, distil
from spartan.post_training.layers import LayerResult, prune_layers
from spartan.post_training.matrices import nonzero_units
from spartan.post_training.network import Network, evaluating_copy
from spartan.post_training.solver import FixedUnits, LayerSolver


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
        plan: What was asked for, and what was chosen where nothing was.
        steps: Steps of the distillation.
        trained: What came of it; None if its weights were not taken.
        solved: Solutions of layers, by name.
    """

    plan: CompressionPlan
    steps: int = 0
    trained: Trained | None = None
    solved: dict[str, LayerResult] = dataclasses.field(default_factory=dict)


_TRIAL = 4  # steps that are timed, after a step that is not: enough for a mean, and over in moments
_RESERVE = 0.92  # of the time is planned; the rest is for what steps that are timed do not do


def steps_within(
    network: Network, method: MaskingMethod, budget: Budget, how: Distillation, seconds: float
) -> int:
    """Return how many steps of a distillation take so long on this machine, at least 1.

    A few steps of a copy are timed, so that two runs may answer differently.
    """
    # Fixed masks are those of what has been pruned; all others are found in a dense network.
    model = evaluating_copy(network.pruned if isinstance(method, Fixed) else network.dense)
    clock: list[float] = []
    trial = dataclasses.replace(network, tick=lambda *_: clock.append(time.perf_counter()))
    began = time.perf_counter()
    distil(trial, model, method, budget, dataclasses.replace(how, steps=_TRIAL + 1))
    each = (clock[-1] - clock[0]) / _TRIAL
    spent = time.perf_counter() - began
    return max(1, int((_RESERVE * seconds - spent) / each))


def run_phases(network: Network, plan: CompressionPlan, clock: Clock) -> Outcome:
    """Allocate, prune and reconstruct: the copy in `network` is compressed then."""
    if plan.method is None:
        plan = _settle(network, plan, clock)
    counts = None
    if not plan.joint:
        with clock("allocation"):
            counts = allocate(network, plan.allocation, _how_to_learn(network, plan, clock))
    if isinstance(plan.method, LayerSolver):
        assert counts is not None
        return _solve(network, plan, plan.method, counts, clock)
    assert plan.method is not None
    return _train(network, plan, plan.method, counts, clock)


def _settle(network: Network, plan: CompressionPlan, clock: Clock) -> CompressionPlan:
    """Choose the combination for the time there is."""
    steps = plan.how.steps
    if plan.minutes is not None:
        with clock("pacing"):
            left = 60 * plan.minutes - clock.total
            steps = steps_within(network, FCPTS(), network.budget, plan.how, left)
    method, allocation, reconstruct = combination(steps)
    if network.pattern.fixed_ratio is not None:
        allocation = "uniform"
    how = dataclasses.replace(plan.how, steps=steps)
    return CompressionPlan(method, allocation, reconstruct, how, None)


def _how_to_learn(network: Network, plan: CompressionPlan, clock: Clock) -> Distillation:
    """Return how an allocation is learned: where time is short, in a quarter of it."""
    how = plan.how
    if plan.minutes is None or plan.allocation != "learned":
        return how
    quarter = 15 * plan.minutes - clock.total
    steps = steps_within(network, FCPTS(), network.budget, how, quarter)
    return dataclasses.replace(how, steps=4 * steps)


def _solve(
    network: Network, plan: CompressionPlan, method: LayerSolver, counts: list[int], clock: Clock
) -> Outcome:
    """Prune layer by layer; then perhaps distil with these masks."""
    with clock("layers"):
        solved = prune_layers(network, method, counts, plan.reconstruct is not None)
    with clock("norms"):
        _refresh_norms(network, plan.how)
    if plan.reconstruct != "network":
        return Outcome(plan, solved=solved)
    budget = network.budget
    if network.pattern.fixed_ratio is None:
        kept = {name: result.units.float().mean() for name, result in solved.items()}
        budget = Budget(allocation={name: float(share) for name, share in kept.items()})
    steps, trained = _distil(network, plan, Fixed(), budget, clock)
    return Outcome(plan, steps, trained, solved)


def _refresh_norms(network: Network, how: Distillation) -> None:
    """Take the running statistics of batch norms anew, where that does better held out.

    Methods that leave weights as they are change what norms get; others have answered to it.
    """
    # Of one sample there are no statistics: of three or more, parts are of two at least.
    batches = network.fit.batches(max(3, network.batch_size))
    batches = [batch for batch in batches if len(next(tensors_of(batch))) > 1]
    if not batches or not any(isinstance(m, _BatchNorm) for m in network.pruned.modules()):
        return
    references = References(network.dense, network.held_out, how.batch_size)
    before = how.loss_on(network.pruned, references)
    with recalibrated(network.pruned, batches):
        after = how.loss_on(network.pruned, references)
        refreshed = copy.deepcopy(network.pruned.state_dict())
    if after < before:
        network.pruned.load_state_dict(refreshed)


def _train(
    network: Network,
    plan: CompressionPlan,
    method: MaskingMethod,
    counts: list[int] | None,
    clock: Clock,
) -> Outcome:
    """Let a method of training find masks during a distillation; then perhaps refit the layers."""
    budget = network.budget
    if plan.joint:
        method = method.with_max_layer_sparsity(network.max_layer_sparsity)
    elif counts is not None and network.pattern.fixed_ratio is None:
        bounds = network.bounds
        pairs = zip(bounds.names, counts, bounds.units, strict=True)
        budget = Budget(allocation={name: k / n for name, k, n in pairs})
    steps, trained = _distil(network, plan, method, budget, clock)
    if plan.reconstruct == "network":
        return Outcome(plan, steps, trained)
    with clock("layers"):
        found = FixedUnits(nonzero_units(network.targets, network.pattern))
        network.pruned.load_state_dict(network.dense.state_dict())
        kept = [int(units.sum()) for units in found.units.values()]
        solved = prune_layers(network, found, kept, plan.reconstruct == "layer")
    return Outcome(plan, steps, None, solved)


def _distil(
    network: Network, plan: CompressionPlan, method: MaskingMethod, budget: Budget, clock: Clock
) -> tuple[int, Trained]:
    how = plan.how
    with clock("distillation"):
        if plan.minutes is not None:
            left = 60 * plan.minutes - clock.total
            how = dataclasses.replace(how, steps=steps_within(network, method, budget, how, left))
        return how.steps, distil(network, network.pruned, method, budget, how)
