"""`GrowingRun`: run of a growth method: prunes and grows connections, never dense."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spartan.always_sparse.conversion import check_first, sparse_layers
from spartan.always_sparse.layer import SparseLayer
from spartan.always_sparse.product import Passes
from spartan.budgets.budget import Budget
from spartan.budgets.group_budget import GroupBudget
from spartan.errors import NonFiniteError, PrunableError, StateError
from spartan.kernels import finite
from spartan.kernels.key_lists import is_in
from spartan.methods.growth.contract import (
    ConnectionValues,
    GrowingLayer,
    GrowthMethod,
    density_of,
    largest,
)
from spartan.sparsifier.connection_moves import Move, apply
from spartan.sparsifier.growing_checks import (
    STATE_VERSION,
    check_counts,
    check_growth_state,
    check_growth_support,
)
from spartan.sparsifier.layer_summary import LayerSummary, named
from spartan.sparsifier.old_states import upgraded_growth
from spartan.sparsifier.optimizers import (
    check_optimizers,
    parameters_of,
    skips_step,
    wrap_closure,
)
from spartan.sparsifier.steps import OptimizerSteps
from spartan.weights.patterns import Pattern
from spartan.weights.prunable import NameFilter


class GrowingRun:
    """Keeps always-sparse layers at a number of connections, under a method that moves them.

    Between two updates nothing happens but counting steps. In the step that an update follows,
    always-sparse layers keep their inputs and the gradients of their outputs, so that gradients
    exist for pairs that are not connected; the optimizer steps, and then connections move. Those
    that survive keep their value and their optimizer state, new ones begin with zeros.

    Args:
        model: The model.
        optimizers: Those to hook; none hooks all.
        method: How connections are found.
        budget: How many connections there are.
        total_steps: Optimizer steps of the whole run.
        pattern: Must be single weights.
        include: Must be None: growth governs all always-sparse layers.
        exclude: Likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        method: GrowthMethod,
        budget: Budget,
        total_steps: int | None,
        pattern: Pattern,
        include: NameFilter | None = None,
        exclude: NameFilter | None = None,
    ) -> None:
        self.method, self.budget = method, budget
        layers = sparse_layers(model)
        if include is not None or exclude is not None:
            raise PrunableError(
                "Growth governs all always-sparse layers: name layers in always_sparse.convert."
            )
        check_growth_support(method, budget, pattern, optimizers, layers)
        values = [_values_of(name, layer) for name, layer in layers.items()]
        self._budgets = _by_values(budget).plan(model, values, pattern)
        check_optimizers(optimizers, values, "neither trained nor grown.")
        for one in values:
            if not bool(torch.isfinite(one.parameter).all()):
                raise NonFiniteError(f"The weight {one.name!r} holds NaN or infinity.")
        self.weights = [
            _growing(one, layer) for one, layer in zip(values, layers.values(), strict=True)
        ]
        check_counts(budget, self._budgets, self.weights, method.moves)
        self.steps = OptimizerSteps(optimizers, total_steps, values)
        self._steppers: list[Optimizer] = []  # those that have stepped, where none was given
        self._listeners: list[RemovableHandle] = []
        self._listen()
        guard = model.register_load_state_dict_pre_hook(check_first)
        self._handles = [*self.steps.hook(self._before_step, self._after_step), guard]

    # What the user asks -------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Connections as a fraction of all pairs."""
        return density_of(self.weights)

    def layers(self) -> list[LayerSummary]:
        """Return what each layer keeps, in the order of the model."""
        return [
            LayerSummary(
                name=layer.name,
                shape=tuple(layer.prunable.shape),
                numel=layer.prunable.numel,
                units=layer.prunable.numel,
                kept_units=layer.connections.count,
                kept=layer.connections.count,
                cost=1.0,
            )
            for layer in self.weights
        ]

    def monitor(self) -> dict[str, float]:
        """Return density, and the share of all pairs that were ever connected."""
        tried = sum(layer.tried.numel() for layer in self.weights)
        return {
            "density": self.density,
            "tried": tried / sum(s.prunable.numel for s in self.weights),
        }

    def budgets(self) -> list[tuple[str, GroupBudget]]:
        """Return what each layer, or all together, may keep."""
        names = [[self.weights[i].name for i in one.members] for one in self._budgets]
        return list(zip(map(named, names), self._budgets, strict=True))

    def progress_after(self, step: int) -> float:
        """Return 1: the budget holds from the beginning."""
        return 1.0

    def moves_after(self, step: int) -> bool:
        """Say whether connections move after a step."""
        return self.method.fraction_at(step, self.steps.horizon) > 0

    def selected(self) -> dict[str, Tensor]:
        """Return the keys output * inputs + input of all connections."""
        return {layer.name: layer.connections.keys() for layer in self.weights}

    def churn(self, before: Mapping[str, Tensor]) -> float:
        """Return the share of the connections that are new since."""
        now = self.selected()
        new = sum(int((~is_in(keys, before[name])).sum()) for name, keys in now.items())
        return new / sum(keys.numel() for keys in now.values())

    def finalize(self) -> None:
        """Take the hooks away; the layers stay always-sparse, see `always_sparse.to_dense`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stop_listening()

    def state_dict(self) -> dict[str, Any]:
        """Return what a bit-for-bit resume needs beside the state dict of the model."""
        return {
            "version": STATE_VERSION,
            "settings": self._settings(),
            "step": self.steps.done,
            "weights": {s.name: {"tried": s.tried, "rounds": s.rounds} for s in self.weights},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; the model's own state, with the connections, is loaded before."""
        state = upgraded_growth(state)
        check_growth_state(state, self._settings(), self.weights)
        check_counts(self.budget, self._budgets, self.weights, self.method.moves)
        self.steps.done = int(state["step"])
        for layer in self.weights:
            saved = state["weights"][layer.name]
            device = layer.tried.device
            layer.tried = saved["tried"].to(device, copy=True)
            layer.rounds = saved["rounds"].to(device, copy=True)
        self._listen()

    # Around a step ------------------------------------------------------------------------------

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        weights = self.steps.weights_of(optimizer)
        if not weights:
            return None
        self.steps.refuse_more(optimizer)

        def checking(closure: Callable[[], Any]) -> Callable[[], Any]:
            def evaluate() -> Any:
                loss = closure()
                self.steps.require_finite_gradients(weights)
                return loss

            return evaluate

        args, kwargs, wrapped = wrap_closure(args, kwargs, checking)
        if not wrapped and not skips_step(optimizer):
            self.steps.require_finite_gradients(weights)
        return (args, kwargs) if wrapped else None

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.steps.weights_of(optimizer):
            return
        if all(optimizer is not known for known in self._steppers):
            self._steppers.append(optimizer)
        if skips_step(optimizer):
            self._listen()
            return
        if not self.steps.completed_by(optimizer):
            return
        broken = [s.name for s, ok in zip(self.weights, self._finite(), strict=True) if not ok]
        if broken:
            raise NonFiniteError(
                f"{', '.join(map(repr, broken))} became NaN or infinite in step "
                f"{self.steps.done + 1}; connections are as before. Lower the learning rate or "
                "clip."
            )
        moves = list(self._moves(self.steps.done + 1))
        self.steps.done += 1
        for move in moves:
            apply(move, self.steps.optimizers or self._steppers, self.method.counts_rounds)
        self._listen()
        if moves:
            self._warn_dead()

    def _finite(self) -> list[bool]:
        return finite([layer.prunable.parameter.detach() for layer in self.weights])

    def _moves(self, step: int) -> Iterator[Move]:
        """Choose what is grown and pruned after a step; nothing is changed yet."""
        fraction = self.method.fraction_at(step, self.steps.horizon)
        if fraction == 0:
            return
        stepped = set().union(*map(parameters_of, self.steps.optimizers or self._steppers))
        for budget in self._budgets:
            members = [self.weights[i] for i in budget.members]
            found = sum(layer.connections.count for layer in members)
            if found != budget.kept:
                raise StateError(
                    f"The layers hold {found:,} connections, and the budget is {budget.kept:,}: "
                    "something else has changed them since the sparsifier was made."
                )
            layers = [
                layer
                for layer in members
                if layer.prunable.parameter.requires_grad
                and id(layer.prunable.parameter) in stepped
            ]
            if self.method.uses_gradients:
                layers = [layer for layer in layers if layer.passes]
            if not layers:
                self._warn_idle(members)
            total = sum(layer.connections.count for layer in layers)
            wanted = min(math.ceil(fraction * total), sum(layer.unconnected for layer in layers))
            if wanted == 0:
                continue
            grown = self.method.grow(layers, wanted, step)
            left = total - sum(keys.numel() for keys in grown)
            kept = largest([layer.prunable.parameter.detach() for layer in layers], left)
            for layer, keys, mask in zip(layers, grown, kept, strict=True):
                yield Move(layer, mask, keys)

    def _listen(self) -> None:
        """Let layers keep what passes through them, if an update follows the next step."""
        self._stop_listening()
        fraction = self.method.fraction_at(self.steps.done + 1, self.steps.horizon)
        if not (self.method.uses_gradients and fraction > 0):
            return
        for layer in self.weights:
            if layer.prunable.parameter.requires_grad:
                layer.module.passes = passes = Passes()
                self._listeners.append(_finishing(passes, layer.prunable.parameter))

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.remove()
        self._listeners = []
        for layer in self.weights:
            layer.module.passes = None

    def _warn_idle(self, layers: list[GrowingLayer]) -> None:
        names = ", ".join(repr(layer.name) for layer in layers)
        warnings.warn(
            f"No gradient of {names} has come before step {self.steps.done + 1}, after which "
            "connections were to move: nothing moves. If several optimizers step the model, give "
            "them all.",
            stacklevel=2,
        )

    def _warn_dead(self) -> None:
        dead = [repr(layer.name) for layer in self.weights if layer.connections.count == 0]
        if dead:
            warnings.warn(
                f"No connection is left of {', '.join(dead)} at step {self.steps.done}: give each "
                "layer a budget of its own, with allocation='er'.",
                stacklevel=2,
            )

    @property
    def attached(self) -> bool:
        """Whether the hooks are there still."""
        return bool(self._handles)

    # Small parts --------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {
            "method": self.method.settings(),
            "total_steps": self.steps.total,
            "budgets": [[b.kept, b.total, *b.costs] for b in self._budgets],
        }


def _finishing(passes: Passes, values: nn.Parameter) -> RemovableHandle:
    """Tell passes when a backward pass has the whole gradient of the values."""

    def finish(gradient: Tensor) -> None:
        passes.finish(values.grad)

    handle: RemovableHandle = values.register_hook(finish)
    return handle


def _by_values(budget: Budget) -> Budget:
    """Let a mapping name the weights as they were called before they were always sparse."""
    if isinstance(budget.allocation, str):
        return budget
    names = {
        f"{name.removesuffix('weight')}values" if name.endswith("weight") else name: density
        for name, density in budget.allocation.items()
    }
    return dataclasses.replace(budget, allocation=names)


def _values_of(name: str, layer: SparseLayer) -> ConnectionValues:
    full = f"{name}.values" if name else "values"
    return ConnectionValues(full, layer.values, full_shape=layer.weight_shape)


def _growing(values: ConnectionValues, layer: SparseLayer) -> GrowingLayer:
    keys = layer.connections.keys()
    return GrowingLayer(values, layer, keys, torch.zeros_like(keys, dtype=torch.int32))
