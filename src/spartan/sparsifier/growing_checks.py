"""Checks of growth: before it starts or resumes, before a step, and before connections move."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer, Rprop

from spartan.budgets.budget import Budget
from spartan.budgets.group_budget import GroupBudget
from spartan.errors import BudgetError, MethodError, PatternError, PrunableError, StateError
from spartan.kernels.key_lists import is_in
from spartan.methods.growth.contract import (
    GrowingLayer,
    GrowthMethod,
    averaged,
    density_of,
    processes,
)
from spartan.sparsifier.old_states import check_step
from spartan.sparsifier.optimizers import nested
from spartan.weights.patterns import Pattern, Unstructured
from spartan.weights.prunable import Prunable

STATE_VERSION = 3  # earlier ones: see `old_states`


def check_growth_support(
    method: GrowthMethod,
    budget: Budget,
    pattern: Pattern,
    optimizers: Sequence[Optimizer],
    layers: Collection[str],
) -> None:
    """Raise unless a growth method can do this.

    Raises:
        PrunableError: There are no layers for it.
        PatternError: Not single connections are asked for.
        BudgetError: The budget is none of connections.
        MethodError: An optimizer keeps what cannot follow connections.
    """
    if not layers:
        raise PrunableError(
            f"{method.name!r} moves the connections of always-sparse layers, and the model has "
            "none: build it with always_sparse.SparseLinear, or call always_sparse.convert(model, "
            "density) before making the optimizer."
        )
    if not isinstance(pattern, Unstructured):
        raise PatternError(f"{method.name!r} grows single connections, not {pattern}.")
    if budget.cost != "parameters" or budget.latency_ms is not None:
        raise BudgetError("Growth keeps a number of connections: only cost='parameters' goes.")
    if budget.count != "prunable":
        raise BudgetError("Growth counts always-sparse layers only: count='prunable' it must be.")
    for optimizer in optimizers:
        check_growth_optimizer(method, optimizer)


def check_growth_optimizer(method: GrowthMethod, optimizer: Optimizer) -> None:
    """Raise `MethodError` if an optimizer keeps what cannot follow connections."""
    if method.moves and any(isinstance(one, LBFGS | Rprop) for one in nested(optimizer)):
        raise MethodError(
            "LBFGS keeps a history that is not one number a weight, and Rprop one that cannot "
            "begin at zero, so they do not go with moving connections; use another optimizer."
        )


def check_counts(
    budget: Budget, budgets: Sequence[GroupBudget], layers: Sequence[GrowingLayer], moves: bool
) -> None:
    """Raise `BudgetError` unless the layers hold what the budget says."""
    for one in budgets:
        members = [layers[i] for i in one.members]
        found = sum(layer.connections.count for layer in members)
        if found != one.kept:
            together = budget.allocation == "global"
            names = "all layers" if together else repr(members[0].name)
            other = "" if together else f" and the allocation {budget.allocation!r}"
            raise BudgetError(
                f"The budget is {one.kept:,} connections of {names}, and there are {found:,}: "
                f"give Budget(density={density_of(layers):.10g}), which may be spread in any way, "
                f"or convert the model with the density{other} of the budget."
            )
        if len(members) > 1 and processes() > 1 and moves:
            raise BudgetError(
                "In several processes the connections of each layer must keep their number: use "
                "allocation='er', 'erk' or 'uniform'."
            )


def check_growth_state(
    state: Mapping[str, Any], settings: Mapping[str, Any], layers: Sequence[GrowingLayer]
) -> None:
    """Raise `StateError` unless a sparsifier with these settings can go on from a state."""
    if state.get("version") != STATE_VERSION or "weights" not in state:
        raise StateError("The state is not one of a growth method, or of another version.")
    for key in ("settings", "step"):
        if key not in state:
            raise StateError(f"The state is damaged: it holds no {key}.")
    check_step(state["step"])
    for key, value in settings.items():
        if state["settings"].get(key) != value:
            raise StateError(
                f"The state was saved with {key}={state['settings'].get(key)}, this sparsifier "
                f"has {key}={value}: resume with the settings the run was begun with."
            )
    names = {layer.name for layer in layers}
    if set(state["weights"]) != names:
        other = ", ".join(sorted(set(state["weights"]) ^ names))
        raise StateError(f"The state is of another model; it differs in {other}.")
    for layer in layers:
        held = state["weights"][layer.name]
        if not (isinstance(held, tuple) and len(held) == 1):
            raise StateError(f"The state is damaged: it holds no pairs of {layer.name!r}.")
        _check_tried(held[0], layer.name)


def check_connections(state: Mapping[str, Any], layers: Sequence[GrowingLayer]) -> None:
    """Raise `StateError` unless the layers hold the connections that belong to a state."""
    for layer in layers:
        (saved,) = state["weights"][layer.name]
        tried = saved["tried"].to(layer.tried.device)
        if not bool(is_in(layer.connections.keys(), tried).all()):
            raise StateError(
                f"The connections of {layer.name!r} are not those of the state: load the model's "
                "state dict first, and of the same step."
            )


def _check_tried(saved: Mapping[str, Any], name: str) -> None:
    tried, rounds = saved.get("tried"), saved.get("rounds")
    sound = (
        isinstance(tried, Tensor)
        and isinstance(rounds, Tensor)
        and (tried.dtype, rounds.dtype) == (torch.int64, torch.int32)
        and tried.dim() == 1
        and tried.shape == rounds.shape
        and bool((tried.diff() > 0).all())
    )
    if not sound:
        raise StateError(f"The state is damaged: what it holds of {name!r} is no list of pairs.")


def require_known_graphs(layers: Sequence[GrowingLayer], done: int) -> None:
    """Raise `StateError` if connections were loaded without the states that belong to them."""
    for layer in layers:
        if layer.exchanged:
            raise StateError(
                f"The connections of {layer.name!r} are others than after step {done}: a state was "
                "loaded, and what the optimizer keeps belongs to the connections before. Load the "
                "optimizer's state of the same step too, and then the sparsifier's, before the "
                "next step."
            )


def require_explained(
    layers: Sequence[GrowingLayer], weights: Sequence[Prunable], step: int
) -> None:
    """Raise `StateError` if a coming step grows by other gradients than it steps by.

    Args:
        layers: All layers.
        weights: What the optimizer steps.
        step: The coming step.
    """
    stepped = set(map(id, weights))
    for layer in layers:
        passes, gradient = layer.module.passes, layer.prunable.parameter.grad
        if passes is None or gradient is None or id(layer.prunable) not in stepped:
            continue
        if not passes.explain(gradient, averaged):
            raise StateError(
                f"The gradient of {layer.name!r} is not the sum of the backward passes before step "
                f"{step}, after which connections grow where gradients are large: it was changed "
                "or set by hand, or passes for something else came between. Scaling and clipping "
                "are fine. Grow with 'set', which looks at no gradients, or leave the gradient to "
                "backward()."
            )


def refuse_averages(layers: Sequence[GrowingLayer]) -> None:
    """Raise `StateError` before connections move away from under an average."""
    for layer in layers:
        if layer.module.averaged:
            raise StateError(
                f"Connections of {layer.name!r} are about to move, and values are written into a "
                "copy of it, as averages of a model do: it would mix values of different "
                "connections. Average when connections no longer move (end=), or average "
                "always_sparse.to_dense(copy.deepcopy(model))."
            )
