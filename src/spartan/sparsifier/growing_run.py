"""`GrowingRun`: run of a growth method: prunes and grows connections, never dense."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spartan.always_sparse.conversion import check_first, sparse_layers
from spartan.always_sparse.layer import SparseLayer
from spartan.always_sparse.product import Passes
from spartan.budgets.budget import Budget
from spartan.errors import NonFiniteError, PrunableError, StateError
from spartan.kernels import finite
from spartan.methods.growth.contract import (
    ConnectionValues,
    GrowingLayer,
    GrowthMethod,
    largest,
)
from spartan.sparsifier.connection_moves import Move, apply, check_carried
from spartan.sparsifier.governors import govern, release
from spartan.sparsifier.growing_checks import (
    STATE_VERSION,
    check_connections,
    check_counts,
    check_growth_optimizer,
    check_growth_state,
    check_growth_support,
    refuse_averages,
    require_explained,
    require_known_graphs,
)
from spartan.sparsifier.growing_model import GrowingModel
from spartan.sparsifier.old_states import understood, upgraded_growth
from spartan.sparsifier.optimizers import (
    check_optimizers,
    parameters_of,
    skips_step,
    wrap_closure,
)
from spartan.sparsifier.projection import Keep
from spartan.sparsifier.steps import OptimizerSteps
from spartan.weights.coverage import say_coverage
from spartan.weights.maskable import check_maskable
from spartan.weights.names import plain_name, wrapper_prefix
from spartan.weights.patterns import Pattern
from spartan.weights.prunable import NameFilter, Prunable


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

    Attributes:
        weights: The layers, in the order of the model.
        steps: The count of steps.
        facts: What the model holds now.
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
        prefix = wrapper_prefix(model)
        values = [_values_of(plain_name(n, prefix), layer) for n, layer in layers.items()]
        self._budgets = _by_values(budget).plan(model, values, pattern)
        check_optimizers(optimizers, values, "neither trained nor grown.")
        check_maskable(values)
        self.weights = [
            _growing(one, layer) for one, layer in zip(values, layers.values(), strict=True)
        ]
        check_counts(budget, self._budgets, self.weights, method.moves)
        self.steps = OptimizerSteps(optimizers, total_steps, values)
        self._listeners: list[RemovableHandle] = []
        self._said_written = False
        self._idle: set[str] = set()  # layers of which it was said that no gradient came
        self.facts = GrowingModel(model, self.weights, self._budgets)
        govern(values, self)
        self._listen()
        self._guard = model.register_load_state_dict_pre_hook(check_first)
        accept = partial(check_growth_optimizer, method)
        say_coverage(self.facts.coverage, decided=False, stacklevel=4)
        self.steps.hook(self._before_step, self._after_step, accept, self.facts.watch.other_step)

    # What the user asks -------------------------------------------------------------------------

    @property
    def at_budget(self) -> bool:
        """Return True: the budget holds from the beginning."""
        return True

    @property
    def first_weight(self) -> Prunable:
        """The first of the weights."""
        return self.weights[0].prunable

    @property
    def connections_exchanged(self) -> bool:
        """Whether connections were loaded since."""
        return any(layer.exchanged for layer in self.weights)

    def progress_after(self, step: int) -> float:
        """Return 1: the budget holds from the beginning."""
        return 1.0

    def moves_after(self, step: int) -> bool:
        """Say whether connections move after a step."""
        return self.method.fraction_at(step, self.steps.horizon) > 0

    @property
    def moves(self) -> bool:
        """Whether connections move in what is left of the run."""
        return self.attached and any(map(self.moves_after, self.steps.left))

    def finalize(self, keep: Keep | None = None) -> None:
        """Take the hooks away; the layers stay always-sparse, see `always_sparse.to_dense`."""
        if not self.attached:
            return
        if keep != "model":
            self.facts.watch.require_present()
        if self.steps.done == 0 and self.method.moves:
            warnings.warn(
                f"finalize() after 0 of {self.steps.total} steps: no connection has moved. Steps "
                "are those of a torch.optim.Optimizer.",
                stacklevel=3,
            )
        self.abandon()

    def extend(self, total_steps: int) -> None:
        """Let the schedule end after so many steps; see `Sparsifier.extend`."""
        self.steps.total = total_steps
        self._listen()

    def retarget(self, budget: Budget) -> None:
        """Refuse: the connections are there."""
        raise StateError(
            "Always-sparse layers hold as many connections as when they were made: convert a model "
            "at the density that it is to have."
        )

    def begin_pass(self, training: bool) -> None:
        """Do nothing: all passes see the same weights."""

    def abandon(self) -> None:
        """Take the hooks away."""
        self.facts.watch.stop()
        release([layer.prunable for layer in self.weights], self)
        self.steps.stop()
        self._guard.remove()
        self._stop_listening()

    def state_dict(self) -> dict[str, Any]:
        """Return what a bit-for-bit resume needs beside the state dict of the model."""
        return {
            "version": STATE_VERSION,
            "settings": self._settings(),
            "step": self.steps.done,
            "weights": {
                s.name: ({"tried": s.tried.clone(), "rounds": s.rounds.clone()},)
                for s in self.weights
            },
        }

    def snapshot(self) -> dict[str, Any]:
        """Return the same."""
        return self.state_dict()

    def prepare(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Read a state, and return what continues from it; see `Sparsifier.load_state_dict`.

        The connections, which the model's own state holds, are looked at when it continues.
        """
        with understood():
            state = upgraded_growth(state)
            check_growth_state(state, self._settings(), self.weights)

        def go_on() -> None:
            check_connections(state, self.weights)
            check_counts(self.budget, self._budgets, self.weights, self.method.moves)
            self.steps.resume(int(state["step"]))
            for layer in self.weights:
                (saved,) = state["weights"][layer.name]
                device = layer.tried.device
                layer.tried = saved["tried"].to(device, copy=True)
                layer.rounds = saved["rounds"].to(device, copy=True)
                layer.known = layer.connections
            self.facts.note()
            self._listen()

        return go_on

    # Around a step ------------------------------------------------------------------------------

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        weights = self.steps.weights_of(optimizer)
        self.facts.watch.step()
        require_known_graphs(self.weights, self.steps.done)
        self._say_written()

        def checking(closure: Callable[[], Any]) -> Callable[[], Any]:
            def evaluate() -> Any:
                with torch.enable_grad():
                    loss = closure()
                self.steps.require_finite_gradients(weights, optimizer)
                require_explained(self.weights, weights, self.steps.done + 1)
                return loss

            return evaluate

        args, kwargs, wrapped = wrap_closure(args, kwargs, checking)
        if not wrapped and not skips_step(optimizer):
            self.steps.require_finite_gradients(weights, optimizer)
            require_explained(self.weights, weights, self.steps.done + 1)
        return (args, kwargs) if wrapped else None

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if skips_step(optimizer):
            self._listen()
            return
        self.facts.note()
        if not self.steps.completed_by(optimizer):
            return
        broken = [s.name for s, ok in zip(self.weights, self._finite(), strict=True) if not ok]
        if broken:
            raise NonFiniteError(
                f"{', '.join(map(repr, broken))} became NaN or infinite in step "
                f"{self.steps.done + 1}; connections are as before. Lower the learning rate or "
                "clip."
            )
        moves = [] if self.steps.surplus else list(self._moves(self.steps.done + 1))
        if moves or self.steps.done == 0:  # the first step has made the optimizer's state
            for layer in self.weights if self.method.moves else []:
                check_carried(layer, self.steps.steppers)
        if moves:
            refuse_averages(self.weights)
        self.steps.done += 1
        for move in moves:
            apply(move, self.steps.steppers, self.method.counts_rounds)
        self.facts.note()
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
        stepped = set().union(*map(parameters_of, self.steps.steppers))
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
        if self.steps.surplus or not (self.method.uses_gradients and fraction > 0):
            return
        for layer in self.weights:
            if layer.prunable.parameter.requires_grad:
                layer.module.passes = passes = Passes()
                self._listeners += _following(passes, layer.prunable.parameter)

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.remove()
        self._listeners = []
        for layer in self.weights:
            layer.module.passes = None

    def _say_written(self) -> None:
        """Say once that something else has written values, which go on from there."""
        names = [] if self._said_written else self.facts.changed()
        if names:
            self._said_written = True
            warnings.warn(
                f"{', '.join(map(repr, names))} was written outside the optimizer since step "
                f"{self.steps.done}; the written values are taken for the connections of now. An "
                "average of earlier ones would mix values of different connections.",
                stacklevel=3,
            )

    def _warn_idle(self, layers: list[GrowingLayer]) -> None:
        """Say once of each layer that it has nothing to grow by."""
        new = [layer.name for layer in layers if layer.name not in self._idle]
        self._idle.update(new)
        if new:
            warnings.warn(
                f"No gradient of {', '.join(map(repr, new))} has come before step "
                f"{self.steps.done + 1}, after which connections were to move: nothing moves there "
                "in such steps. Experts that a batch skips are fine; if an optimizer was not "
                "given, give it too.",
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
        return not self.steps.over

    # Small parts --------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {
            "method": self.method.settings(),
            "total_steps": self.steps.total,
            "budgets": [[b.kept, b.total, *b.costs] for b in self._budgets],
        }


def _following(passes: Passes, values: nn.Parameter) -> list[RemovableHandle]:
    """Tell passes when a backward pass adds to the gradient of the values, and has done so."""

    def begin(gradient: Tensor) -> None:
        passes.begin(values.grad)

    def finish(parameter: Tensor) -> None:
        passes.finish()

    return [values.register_hook(begin), values.register_post_accumulate_grad_hook(finish)]


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
    if layer.is_copy:
        layer.begin_lineage()
    rounds = torch.zeros_like(keys, dtype=torch.int32)
    return GrowingLayer(values, layer, keys, rounds, layer.connections)
