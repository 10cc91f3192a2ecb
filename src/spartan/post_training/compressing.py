"""`compress`: prunes a trained network to an exact sparsity with calibration samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from spartan.budgets.budget import Budget, as_budget
from spartan.errors import BudgetError, CalibrationError, MethodError, PrunableError
from spartan.example_inputs import run_on
from spartan.methods.masking.contract import MaskingMethod
from spartan.post_training.allocation import Allocation
from spartan.post_training.calibration import Calibration
from spartan.post_training.compression_plan import BEST, Reconstruct, make_plan
from spartan.post_training.distillation import Distillation, References
from spartan.post_training.grams import scout
from spartan.post_training.matrices import nonzero_units
from spartan.post_training.network import (
    Network,
    Tick,
    bounds_of,
    counterparts,
    evaluating_copy,
    require_dense,
)
from spartan.post_training.phases import Clock, Outcome, run_phases
from spartan.post_training.report import CompressionReport, LayerReport
from spartan.post_training.solver import LayerSolver
from spartan.weights.coverage import coverage_of, say_coverage
from spartan.weights.maskable import check_maskable
from spartan.weights.patterns import Pattern, Unstructured
from spartan.weights.prunable import NameFilter, find_prunable


def compress(
    model: nn.Module,
    calibration: Any,
    *,
    budget: Budget | float | None = None,
    density: float | None = None,
    sparsity: float | None = None,
    method: str | LayerSolver | MaskingMethod = "fcpts",
    allocation: Allocation | None = None,
    reconstruct: Reconstruct = "auto",
    pattern: Pattern | None = None,
    cost: str = "parameters",
    max_layer_sparsity: float = 1.0,
    include: NameFilter | None = None,
    exclude: NameFilter | None = None,
    unreached: Literal["error", "dense", "magnitude"] = "error",
    distillation: Distillation | None = None,
    minutes: float | None = None,
    held_out: float = 0.125,
    batch_size: int = 64,
    seed: int = 0,
    inplace: bool = False,
    progress: Tick | None = None,
) -> CompressionReport:
    """Prune a trained model to an exact sparsity with a few hundred unlabelled samples.

    Args:
        model: Any module with Linear, convolution or attention layers. It is left as it is.
        calibration: A tensor with the samples along its first dimension; a tuple of such, or a
            dict, the arguments of one call; or an iterable of batches. Labels are left out.
        budget: How much may stay: a `Budget` of parameters or FLOPs, or a number, the fraction of
            the prunable weights to keep. An allocation it names other than `"global"` counts
            unless `allocation=` is given.
        density: Instead, that fraction alone.
        sparsity: Instead, the fraction to remove.
        method: Finds what stays: `"fcpts"`, `"fcpts-published"`, `"obs"`, `"sparsegpt"`, `"wanda"`,
            `"magnitude"`, one of their classes with settings, any method of `spartan.methods` that
            masks weights, or `"best"`: what does best in the steps or minutes there are.
        allocation: `"global"`, `"uniform"`, `"erk"`, `"learned"` or `"curves"`, or a density for
            each weight by name, moved as little as the budget asks. By default learned for methods
            that train the network, erk for those that solve layer by layer.
        reconstruct: What follows: None leaves the weights as the method does; `"layer"` refits
            what stays by least squares, layer by layer; `"network"` then distils the dense network
            into it. `"auto"`: network for methods that train the network (which is one and the same
            distillation), None for others.
        pattern: Unstructured, Block or NM.
        cost: What the budget counts: `"parameters"`, or `"flops"` of a forward pass.
        max_layer_sparsity: No layer loses a larger fraction than this. Every layer keeps a unit.
        include: Which parameters are prunable, see `find_prunable`.
        exclude: Which are not.
        unreached: What becomes of prunable weights that no calibration sample reaches: an error,
            dense (they do not count then), or pruned by magnitude.
        distillation: How the pruned network learns from the dense one.
        minutes: Time that the whole should take: sets the steps of distillations; what solving
            layers and measuring curves take is as it is. Results then
            depend on the speed of the machine; the report's `settings["steps"]` says what was done.
        held_out: Fraction of the samples that is not compressed with: a distillation ends with the
            weights that do best on it.
        batch_size: Samples of a batch of the calibration.
        seed: Decides what is drawn: the same gives the same result.
        inplace: Whether the result is also written into `model`, once it is there.
        progress: Called with a phase, what is done of it, and all of it.

    Returns:
        The report, with the compressed model: exactly round(density x weights) are not zero (with
        `cost="flops"`, as many as the budget has room for). At density 1 it is a copy of the model.

    Raises:
        BudgetError: The density is out of range or cannot be reached.
        CalibrationError: There are too few samples, the model does not run on them, or weights
            are not reached.
        MethodError: A method, allocation or reconstruction does not exist or fit together.
        NonFiniteError: The model holds NaN or infinity.
        PatternError: The pattern does not fit.
        PrunableError: Nothing is prunable.
    """
    if budget is not None:
        asked = _check_budget(as_budget(budget), density, sparsity, cost)
        density, sparsity, cost = asked.density, asked.sparsity, str(asked.cost)
        if allocation is None and asked.allocation != "global":
            allocation = asked.allocation
    plan = make_plan(method, allocation, reconstruct, distillation, minutes, pattern)
    if not isinstance(batch_size, int):
        raise MethodError(f"batch_size={batch_size} must be a whole number.")
    if not 0 < held_out < 1 or batch_size < 1 or not 0 <= max_layer_sparsity <= 1:
        raise MethodError(
            f"held_out={held_out} must lie in (0, 1), batch_size={batch_size} be at least 1, and "
            f"max_layer_sparsity={max_layer_sparsity} lie in [0, 1]."
        )
    if cost not in ("parameters", "flops"):
        raise MethodError(f"cost={cost!r} must be 'parameters' or 'flops'.")
    if plan.joint:
        assert isinstance(plan.method, MaskingMethod)
        plan.method.with_max_layer_sparsity(max_layer_sparsity)  # refuses where it knows none
    if unreached not in ("error", "dense", "magnitude"):
        raise MethodError(f"unreached={unreached!r} must be 'error', 'dense' or 'magnitude'.")
    Budget(density=density, sparsity=sparsity)  # refuses what is out of range
    clock = Clock()
    with _own_state(seed):
        with clock("calibration"):
            network, missed = _prepare(
                model, Calibration(calibration, model), density, sparsity, cost,
                pattern or Unstructured(), max_layer_sparsity, (include, exclude), unreached,
                held_out, batch_size, seed, progress or (lambda *_: None), plan.how,
            )  # fmt: skip
        outcome = Outcome(plan)
        if network.budget.fraction != 1:
            outcome = run_phases(network, plan, clock)
        return _finish(model, network, outcome, missed, clock, inplace)


def _check_budget(
    budget: Budget, density: float | None, sparsity: float | None, cost: str
) -> Budget:
    """Return a budget that a compression can keep.

    Raises:
        BudgetError: It is given twice, or it is none of parameters or FLOPs.
    """
    if density is not None or sparsity is not None or cost != "parameters":
        raise BudgetError("Give budget=, or density=, sparsity= and cost=, not both.")
    if budget.latency_ms is not None or budget.count != "prunable":
        raise BudgetError("A compression keeps a fraction of the prunable weights, or of FLOPs.")
    if budget.cost not in ("parameters", "flops"):
        raise BudgetError(f"cost={budget.cost!r} must be 'parameters' or 'flops' to compress.")
    return budget


@contextmanager
def _own_state(seed: int) -> Iterator[None]:
    """Compute with random numbers of one's own, and gradients as they are needed."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.random.fork_rng(),
    ):
        torch.manual_seed(seed)
        yield


def _prepare(
    model: nn.Module,
    samples: Calibration,
    density: float | None,
    sparsity: float | None,
    cost: str,
    pattern: Pattern,
    max_layer_sparsity: float,
    names: tuple[NameFilter | None, NameFilter | None],
    unreached: str,
    held_out: float,
    batch_size: int,
    seed: int,
    tick: Tick,
    how: Distillation,
) -> tuple[Network, list[str]]:
    """Look at the model and the samples; also return the names of weights that are not reached."""
    require_dense(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise PrunableError(
            "A scripted or traced model has no layers that can be changed: compress the model that "
            "it was made from, and script or trace the result."
        )
    found = find_prunable(model, *names)
    check_maskable(found)
    say_coverage(coverage_of(model, found), decided=names != (None, None), stacklevel=4)
    if len(samples) < 2:
        raise CalibrationError(
            f"There is {len(samples)} calibration sample: at least 2 are needed, one of them to "
            "hold out; a few hundred are better."
        )
    count = min(len(samples) - 1, max(1, round(held_out * len(samples))))
    fit, kept_back = samples.split(count, seed)
    dense = evaluating_copy(model)
    dense.requires_grad_(False)
    weights = counterparts(found, dense)
    samples.check_first_dimension(dense)
    try:
        reach = scout(dense, fit.batches(batch_size), weights)
    except CalibrationError as error:
        samples.refuse_single_samples(dense, error)
        raise
    scout(dense, kept_back.batches(batch_size), weights)  # refuses what is not finite
    with torch.no_grad():
        how.check(run_on(dense, fit.batches(2)[0]))
    missed = [w.name for i, w in enumerate(weights) if i not in reach]
    if missed and unreached == "error":
        raise CalibrationError(
            f"No calibration sample reaches {', '.join(map(repr, missed))}. Give samples that do, "
            "or unreached='dense' to leave them out, or unreached='magnitude' to prune them too. "
            "(Not recognised: weights that autocast inside of forward casts, or that are computed, "
            "as by weight norms.)"
        )
    if missed and unreached == "dense":
        number = {i: k for k, i in enumerate(sorted(reach))}
        weights = [weights[i] for i in sorted(reach)]
        reach = {number[i]: r for i, r in reach.items()}
        if not weights:
            raise CalibrationError("No calibration sample reaches any prunable weight.")
    sample = fit.batches(1)[0] if cost == "flops" else None
    budget = Budget(density=density, sparsity=sparsity, cost=cost, example_input=sample)
    bounds = bounds_of(dense, weights, pattern, budget, max_layer_sparsity)
    pruned = evaluating_copy(model)
    targets = counterparts(weights, pruned)
    network = Network(
        dense, pruned, weights, targets, reach, pattern, budget, bounds, fit, kept_back,
        batch_size, seed, max_layer_sparsity, tick,
    )  # fmt: skip
    return network, missed


def _finish(
    model: nn.Module,
    network: Network,
    outcome: Outcome,
    missed: list[str],
    clock: Clock,
    inplace: bool,
) -> CompressionReport:
    plan, trained = outcome.plan, outcome.trained
    how = plan.how
    loss = 0.0
    if network.budget.fraction == 1:
        network.pruned = evaluating_copy(model)  # untouched by the passes
        network.targets = counterparts(network.weights, network.pruned)
    else:
        with clock("evaluation"):
            references = References(network.dense, network.held_out, how.batch_size)
            loss = how.loss_on(network.pruned, references)
    for module, copy in zip(model.modules(), network.pruned.modules(), strict=True):
        copy.training = module.training
    for parameter, twin in zip(model.parameters(), network.pruned.parameters(), strict=True):
        twin.requires_grad_(parameter.requires_grad)
        twin.grad = None
    if inplace:
        model.load_state_dict(network.pruned.state_dict())
    kept = nonzero_units(network.targets, network.pattern)
    layers = []
    for target, cost in zip(network.targets, network.bounds.costs, strict=True):
        result = outcome.solved.get(target.name)
        error, seconds = (math.nan, 0.0) if result is None else (result.error, result.seconds)
        units = kept[target.name]
        layers.append(
            LayerReport(
                target.name, tuple(target.shape), target.numel, target.kept,
                units.numel(), int(units.sum()), cost, error, seconds,
            )
        )  # fmt: skip
    method = {"name": BEST} if plan.method is None else plan.method.settings()
    settings = {
        "method": method,
        "allocation": plan.allocation if isinstance(plan.allocation, str) else "given",
        "reconstruct": plan.reconstruct,
        "pattern": str(network.pattern),
        "density": float(network.budget.fraction or 0),
        "cost": network.budget.cost,
        "seed": network.seed,
        "steps": outcome.steps,
    }
    if outcome.steps:
        hidden = ("augment", "steps")
        settings["distillation"] = {k: v for k, v in vars(how).items() if k not in hidden}
    return CompressionReport(
        model if inplace else network.pruned, layers, settings, loss,
        (len(network.fit), len(network.held_out)), clock.phases,
        [] if trained is None else trained.rows, 0 if trained is None else trained.step, missed,
    )  # fmt: skip
