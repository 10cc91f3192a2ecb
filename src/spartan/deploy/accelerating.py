"""`accelerate`: runs layers on sparse inference kernels where they measure faster than dense."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from spartan.deploy.comparison import dense_copy, relative_error, run_on_example
from spartan.deploy.graph import fuse, simplify, trace
from spartan.deploy.inference_layers import InferenceLayer, inference_layer, replaceable
from spartan.deploy.plan import LayerPlan, Plan, pattern_of
from spartan.deploy.timing import Timing, busy_warning, time_side_by_side
from spartan.errors import DeployError
from spartan.example_inputs import run_on
from spartan.kernels import backend
from spartan.kernels.row_bundles import best_height

# Denser than this, no sparse kernel has won except on a handful of inputs: not worth measuring.
_TOO_DENSE, _HANDFUL = 0.7, 64
# Relative error of the outputs at which the result is refused: float32 sums in another order stay
# far below it.
_TOLERANCE = 1e-5


def accelerate(
    model: nn.Module, example_input: Any, *, seconds: float = 0.1, verbose: bool = True
) -> nn.Module:
    """Return a model for inference that runs sparse where that is faster.

    Each Linear and Conv2d is timed, dense and sparse, on the inputs it gets from `example_input`,
    with the current number of threads. Batch norms are folded, and residual additions, ReLU and
    GELU are fused into the sparse layers before them, if torch.fx can trace the model. The result
    then takes the same arguments, but has the class, attributes and hooks of a graph; a model that
    cannot be traced keeps its own. Where nothing is won, it is a plain copy.

    The given model is not changed. The result holds copies, in evaluation mode; it can be pickled
    and deep-copied, and its state dict saved and loaded. It takes inputs of any size, but what is
    fastest was measured on this one. Its `plan` attribute says what was measured; a deep copy of a
    traced model has none.

    Args:
        model: The model, with zeros where it was pruned.
        example_input: One input: a tensor, a tuple of positional or a dict of keyword arguments.
        seconds: How long to measure each layer.
        verbose: Print the plan.

    Raises:
        DeployError: The model cannot be copied or run on the example, or the result would differ
            from it by more than 1e-5 (relative to the norm).
    """
    # Outside inference mode: the copy's buffers are to be ordinary tensors.
    with torch.inference_mode(False), torch.no_grad():
        dense = dense_copy(model).eval().requires_grad_(False)
        reference = run_on_example(dense, example_input)
        warning = busy_warning()
        try:
            work, layers, traced = _build(dense, example_input, reference, seconds, tracing=True)
        except DeployError:
            # Something that fusing did not foresee: replacing layers alone is safer.
            work, layers, traced = _build(dense, example_input, reference, seconds, tracing=False)
    with torch.inference_mode():
        example_input = copy.deepcopy(example_input)
        dense_time, time = time_side_by_side(
            [lambda: run_on(dense, example_input), lambda: run_on(work, example_input)],
            max(5 * seconds, 0.2),
        )
    if work is dense or time.median > dense_time.median:
        work, time = dense, dense_time
        layers = [layer.staying_dense("the whole model was slower") for layer in layers]
    plan = Plan(
        layers=layers,
        dense=dense_time,
        accelerated=time,
        threads=torch.get_num_threads(),
        kernels=str(backend()),
        traced=traced,
        warnings=[warning] if warning else [],
    )
    work.plan = plan  # type: ignore[assignment]
    if verbose:
        print(plan)  # noqa: T201
    return work


def plan_of(accelerated: nn.Module) -> Plan:
    """Return the plan of a model that `accelerate` returned."""
    plan = accelerated.plan
    assert isinstance(plan, Plan)
    return plan


def _build(
    dense: nn.Module, example_input: Any, reference: Any, seconds: float, tracing: bool
) -> tuple[nn.Module, list[LayerPlan], bool]:
    """Return the model with sparse layers where they win, the layers, and whether it was traced."""
    work = copy.deepcopy(dense)
    if isinstance(work, nn.Linear | nn.Conv2d):
        work = nn.Sequential(work)  # so that it can be replaced
    traced = trace(work, example_input) if tracing else None
    if traced is not None:
        simplify(traced)
        work = traced
    layers, sparse = _choose(work, example_input, seconds)
    if not sparse:
        return dense, layers, traced is not None
    _replace(work, sparse)
    if traced is not None:
        fuse(traced)
    _refuse_difference(run_on_example(work, example_input), reference)
    return work, layers, traced is not None


def _replace(model: nn.Module, layers: dict[str, InferenceLayer]) -> None:
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    for module in model.modules():
        fast_path = isinstance(module, nn.TransformerEncoderLayer)
        if fast_path and any(isinstance(m, InferenceLayer) for m in module.children()):
            # The fast path reads the dense weights of its linear layers.
            module.activation_relu_or_gelu = 0  # type: ignore[assignment]


def _choose(
    model: nn.Module, example_input: Any, seconds: float
) -> tuple[list[LayerPlan], dict[str, InferenceLayer]]:
    """Time every layer; return what was found, and the sparse layers that won."""
    inputs = _inputs(model, example_input)
    plans: list[LayerPlan] = []
    chosen: dict[str, InferenceLayer] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        plan, layer = _choose_layer(name, module, inputs.get(module), seconds)
        plans.append(plan)
        if layer is not None:
            chosen[name] = layer
    return plans, chosen


def _choose_layer(
    name: str, module: nn.Linear | nn.Conv2d, x: Tensor | None, seconds: float
) -> tuple[LayerPlan, InferenceLayer | None]:
    matrix = module.weight.detach().flatten(1)
    density = int(torch.count_nonzero(matrix)) / max(1, matrix.numel())
    height = best_height(matrix)
    facts = (name, tuple(module.weight.shape), density, pattern_of(matrix, height))
    note = _why_dense(module, x, density)
    if note or x is None:
        return LayerPlan(*facts, "dense", note=note), None
    candidates = [inference_layer(module, h) for h in sorted({1, height})]
    with torch.inference_mode():
        calls = [lambda layer=layer: layer(x) for layer in (module, *candidates)]
        dense, *times = time_side_by_side(calls, seconds)
    best = min(range(len(times)), key=lambda i: times[i].median)
    sparse: Timing = times[best]
    wins = sparse.median < dense.median
    rows = candidates[best].values.shape[1]
    form = ("rows" if rows == 1 else f"rows of {rows}") if wins else "dense"
    return LayerPlan(*facts, form, dense, sparse), candidates[best] if wins else None


def _why_dense(module: nn.Linear | nn.Conv2d, x: Tensor | None, density: float) -> str:
    """Return why a layer stays dense without being measured, or nothing."""
    if x is None:
        return "not called by itself"
    if not replaceable(module):
        return "no kernel for its class, groups or padding"
    if not x.numel() or not module.weight.numel():
        return "empty"
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return f"{x.dtype} on {x.device.type}".replace("torch.", "")
    many = module.weight[0].numel() > _HANDFUL
    return "too dense" if density > _TOO_DENSE and many else ""


def _inputs(model: nn.Module, example_input: Any) -> dict[nn.Module, Tensor]:
    """Return the first input of each layer that is called."""
    seen: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor) and module not in seen:
            seen[module] = x.clone()

    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        run_on_example(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _refuse_difference(result: Any, reference: Any) -> None:
    error = relative_error(result, reference)
    if error > _TOLERANCE:
        raise DeployError(
            f"The accelerated model would differ from the given one (relative error {error:.1e}). "
            "Does the model compute something random in evaluation mode?"
        )
