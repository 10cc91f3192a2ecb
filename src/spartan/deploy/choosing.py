"""`choose`: times every layer, dense and sparse, and says of each why it runs as it does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from spartan.deploy.comparison import TOLERANCE, relative_error, run_on_example
from spartan.deploy.inference_layers import (
    InferenceLayer,
    inference_layer,
    matrix_of,
    why_not_replaceable,
)
from spartan.deploy.plan import LayerPlan, pattern_of
from spartan.deploy.timing import Timing, time_side_by_side
from spartan.kernels.row_bundles import best_height

# Denser than this, no sparse kernel has won except on a handful of inputs: not worth measuring.
_TOO_DENSE, _HANDFUL = 0.7, 64


def choose(
    model: nn.Module, example_input: Any, seconds: float
) -> tuple[list[LayerPlan], dict[str, InferenceLayer]]:
    """Time every layer; return what was found, and the sparse layers that won.

    Args:
        model: Dense, in evaluation mode; its state is changed by the run on the example.
        example_input: One input.
        seconds: How long to measure a layer.
    """
    inputs = _inputs(model, example_input)
    plans: list[LayerPlan] = []
    chosen: dict[str, InferenceLayer] = {}
    owners: dict[int, str] = {}  # of each weight, the first layer that has it
    for name, module in model.named_modules():
        for key, weight in module._parameters.items():
            if weight is None or weight.dim() < 2:
                continue
            layer_name = name if key == "weight" else ".".join(filter(None, (name, key)))
            owner = owners.setdefault(id(weight), layer_name)
            reason = f"tied to {owner}" if owner != layer_name else _why_dense(module)
            if reason:
                plans.append(_plan(layer_name, weight, note=reason))
                continue
            plan, layer = _choose_layer(layer_name, module, inputs.get(module), seconds)
            plans.append(plan)
            if layer is not None:
                chosen[layer_name] = layer
    tied = {plan.note.removeprefix("tied to ") for plan in plans if plan.note[:8] == "tied to "}
    plans = [p.staying_dense("others share its weight") if p.name in tied else p for p in plans]
    return plans, {name: layer for name, layer in chosen.items() if name not in tied}


def _why_dense(module: nn.Module) -> str:
    """Return why a module with a weight has no sparse layer; nothing if it has one."""
    if isinstance(module, nn.MultiheadAttention):
        return "fused projections of attention: no sparse kernel"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "a table: only the rows asked for are read"
    if isinstance(module, ParametrizationList):
        return "parametrised: make it permanent with parametrize.remove_parametrizations"
    return why_not_replaceable(module)


def _plan(
    name: str,
    weight: Tensor,
    form: str = "dense",
    timings: tuple[Timing | None, Timing | None] = (None, None),
    note: str = "",
) -> LayerPlan:
    matrix = weight.detach().flatten(1)
    countable = not weight.is_meta and weight.layout is torch.strided
    density = int(torch.count_nonzero(matrix)) / max(1, matrix.numel()) if countable else 1.0
    plain = countable and matrix.dtype.is_floating_point
    pattern = pattern_of(matrix, best_height(matrix.float())) if plain else "dense"
    return LayerPlan(name, tuple(weight.shape), density, pattern, form, *timings, note=note)


def _choose_layer(
    name: str, module: Any, x: Tensor | None, seconds: float
) -> tuple[LayerPlan, InferenceLayer | None]:
    matrix = matrix_of(module)
    note = _why_unmeasured(matrix, x)
    if note or x is None:
        return _plan(name, module.weight, note=note), None
    candidates = [inference_layer(module, h) for h in sorted({1, best_height(matrix)})]
    with torch.inference_mode():
        error = max(relative_error(layer(x), module(x)) for layer in candidates)
        if not error <= TOLERANCE:
            return _plan(name, module.weight, note=f"would differ by {error:.0e}"), None
        calls = [lambda layer=layer: layer(x) for layer in (module, *candidates)]
        dense, *times = time_side_by_side(calls, seconds)
    best = min(range(len(times)), key=lambda i: times[i].median)
    wins = times[best].median < dense.median
    rows = candidates[best].values.shape[1]
    form = ("rows" if rows == 1 else f"rows of {rows}") if wins else "dense"
    plan = _plan(name, module.weight, form, (dense, times[best]))
    return plan, candidates[best] if wins else None


def _why_unmeasured(matrix: Tensor, x: Tensor | None) -> str:
    """Return why a layer stays dense without being measured, or nothing."""
    if x is None:
        return "not called by itself"
    if not x.numel() or not matrix.numel():
        return "empty"
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return f"its input is {x.dtype} on {x.device.type}".replace("torch.", "")
    density = int(torch.count_nonzero(matrix)) / matrix.numel()
    return "too dense" if density > _TOO_DENSE and matrix.shape[1] > _HANDFUL else ""


def _inputs(model: nn.Module, example_input: Any) -> dict[nn.Module, Tensor]:
    """Return the first input of each layer that is called."""
    seen: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor) and module not in seen:
            seen[module] = x.clone()

    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if not why_not_replaceable(module)
    ]
    try:
        run_on_example(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    return seen
