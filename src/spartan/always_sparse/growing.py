"""The sparsifier of the growth methods: connections move, weights are never dense."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spartan.always_sparse.checks import (
    STATE_VERSION,
    check_counts,
    check_request,
    check_state,
)
from spartan.always_sparse.conversion import check_first, sparse_layers
from spartan.always_sparse.growth import Growth, SparseSite, SparseWeight, density_of, largest
from spartan.always_sparse.layer import SparseLayer
from spartan.always_sparse.moving import Move, apply
from spartan.always_sparse.product import Passes
from spartan.budget import Budget
from spartan.errors import (
    NonFiniteError,
    PrunableError,
    StateError,
)
from spartan.kernels import finite
from spartan.kernels.key_lists import is_in
from spartan.optimizer_steps import (
    check_optimizers,
    parameters_of,
    skips_step,
    wrap_closure,
)
from spartan.patterns import Pattern
from spartan.prunable import NameFilter
from spartan.shares import Share
from spartan.sparsifier import Sparsifier, named
from spartan.summary import LayerSummary


class GrowingSparsifier(Sparsifier):
    """The sparsifier of the growth methods.

    Between two updates nothing happens but counting steps. In the step that an update follows,
    always-sparse layers keep their inputs and the gradients of their outputs, so that gradients
    exist for pairs that are not connected; the optimizer steps, and then connections move. Those
    that survive keep their value and their optimizer state, new ones begin with zeros.
    """

    method: Growth
    sites: list[SparseSite]

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        method: Growth,
        budget: Budget,
        total_steps: int | None,
        pattern: Pattern | None = None,
        include: NameFilter | None = None,
        exclude: NameFilter | None = None,
    ) -> None:
        super().__init__(model, optimizer, method, budget, total_steps, pattern)
        self.method = method
        layers = sparse_layers(model)
        if include is not None or exclude is not None:
            raise PrunableError(
                "Growth governs all always-sparse layers: name layers in always_sparse.convert."
            )
        check_request(method, budget, self.pattern, self._optimizers, layers)
        weights = [_weight(name, layer) for name, layer in layers.items()]
        self._shares = _by_values(budget).plan(model, weights, self.pattern)
        check_optimizers(self._optimizers, weights, "neither trained nor grown.")
        for weight in weights:
            if not bool(torch.isfinite(weight.parameter).all()):
                raise NonFiniteError(f"The weight {weight.name!r} holds NaN or infinity.")
        self.sites = [
            _site(weight, layer) for weight, layer in zip(weights, layers.values(), strict=True)
        ]
        check_counts(budget, self._shares, self.sites, method.moves)
        self._steppers: list[Optimizer] = []  # those that have stepped, where none was given
        self._listeners: list[RemovableHandle] = []
        self._listen()
        guard = model.register_load_state_dict_pre_hook(check_first)
        self._handles = [*self._hook_steps(), guard]

    # What the user asks -------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Connections as a fraction of all pairs."""
        return density_of(self.sites)

    def layers(self) -> list[LayerSummary]:
        """Return what each layer keeps, in the order of the model."""
        return [
            LayerSummary(
                name=site.name,
                shape=tuple(site.weight.shape),
                numel=site.weight.numel,
                units=site.weight.numel,
                kept_units=site.connections.count,
                kept=site.connections.count,
                cost=1.0,
            )
            for site in self.sites
        ]

    def monitor(self) -> dict[str, float]:
        """Return density, and the share of all pairs that were ever connected."""
        tried = sum(site.tried.numel() for site in self.sites)
        return {"density": self.density, "tried": tried / sum(s.weight.numel for s in self.sites)}

    def shares(self) -> list[tuple[str, Share]]:
        """Return what each layer, or all together, may keep."""
        names = [[self.sites[i].name for i in share.members] for share in self._shares]
        return list(zip(map(named, names), self._shares, strict=True))

    def progress_after(self, step: int) -> float:
        """Return 1: the budget holds from the beginning."""
        return 1.0

    def moves_after(self, step: int) -> bool:
        """Say whether connections move after a step."""
        return self.method.fraction_at(step, self._horizon) > 0

    def selected(self) -> dict[str, Tensor]:
        """Return the keys output * inputs + input of all connections."""
        return {site.name: site.connections.keys() for site in self.sites}

    def churn(self, before: Mapping[str, Tensor]) -> float:
        """Return the share of the connections that are new since."""
        now = self.selected()
        new = sum(int((~is_in(keys, before[name])).sum()) for name, keys in now.items())
        return new / sum(keys.numel() for keys in now.values())

    def finalize(self) -> None:
        """Take the hooks away; the layers stay always-sparse, see `always_sparse.to_dense`."""
        self._require_attached()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stop_listening()

    def state_dict(self) -> dict[str, Any]:
        self._require_attached()
        sites = {s.name: {"tried": s.tried, "rounds": s.rounds} for s in self.sites}
        return {
            "version": STATE_VERSION,
            "settings": self._settings(),
            "step": self.step,
            "sites": sites,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; the model's own state, with the connections, is loaded before."""
        self._require_attached()
        check_state(state, self._settings(), self.sites)
        check_counts(self.budget, self._shares, self.sites, self.method.moves)
        self.step = int(state["step"])
        for site in self.sites:
            saved = state["sites"][site.name]
            device = site.tried.device
            site.tried = saved["tried"].to(device, copy=True)
            site.rounds = saved["rounds"].to(device, copy=True)
        self._listen()

    # Around a step ------------------------------------------------------------------------------

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        weights = self._steps(optimizer)
        if not weights:
            return None
        self._refuse_more_steps(optimizer)

        def checking(closure: Callable[[], Any]) -> Callable[[], Any]:
            def evaluate() -> Any:
                loss = closure()
                self._require_finite(weights)
                return loss

            return evaluate

        args, kwargs, wrapped = wrap_closure(args, kwargs, checking)
        if not wrapped and not skips_step(optimizer):
            self._require_finite(weights)
        return (args, kwargs) if wrapped else None

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._steps(optimizer):
            return
        if all(optimizer is not known for known in self._steppers):
            self._steppers.append(optimizer)
        if skips_step(optimizer):
            self._listen()
            return
        if not self._completes_step(optimizer):
            return
        broken = [s.name for s, ok in zip(self.sites, self._finite(), strict=True) if not ok]
        if broken:
            raise NonFiniteError(
                f"{', '.join(map(repr, broken))} became NaN or infinite in step {self.step + 1}; "
                "connections are as before. Lower the learning rate or clip."
            )
        moves = list(self._moves(self.step + 1))
        self.step += 1
        for move in moves:
            apply(move, self._optimizers or self._steppers, self.method.counts_rounds)
        self._listen()
        if moves:
            self._warn_dead()

    def _finite(self) -> list[bool]:
        return finite([site.weight.parameter.detach() for site in self.sites])

    def _moves(self, step: int) -> Iterator[Move]:
        """Choose what is grown and pruned after a step; nothing is changed yet."""
        fraction = self.method.fraction_at(step, self._horizon)
        if fraction == 0:
            return
        stepped = set().union(*map(parameters_of, self._optimizers or self._steppers))
        for share in self._shares:
            members = [self.sites[i] for i in share.members]
            found = sum(site.connections.count for site in members)
            if found != share.kept:
                raise StateError(
                    f"The layers hold {found:,} connections, and the budget is {share.kept:,}: "
                    "something else has changed them since the sparsifier was made."
                )
            sites = [
                site
                for site in members
                if site.weight.parameter.requires_grad and id(site.weight.parameter) in stepped
            ]
            if self.method.uses_gradients:
                sites = [site for site in sites if site.passes]
            if not sites:
                self._warn_idle(members)
            total = sum(site.connections.count for site in sites)
            wanted = min(math.ceil(fraction * total), sum(site.unconnected for site in sites))
            if wanted == 0:
                continue
            grown = self.method.grow(sites, wanted, step)
            left = total - sum(keys.numel() for keys in grown)
            kept = largest([site.weight.parameter.detach() for site in sites], left)
            for site, keys, mask in zip(sites, grown, kept, strict=True):
                yield Move(site, mask, keys)

    def _listen(self) -> None:
        """Let layers keep what passes through them, if an update follows the next step."""
        self._stop_listening()
        fraction = self.method.fraction_at(self.step + 1, self._horizon)
        if not (self.method.uses_gradients and fraction > 0):
            return
        for site in self.sites:
            if site.weight.parameter.requires_grad:
                site.layer.passes = passes = Passes()
                self._listeners.append(_finishing(passes, site.weight.parameter))

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            listener.remove()
        self._listeners = []
        for site in self.sites:
            site.layer.passes = None

    def _warn_idle(self, sites: list[SparseSite]) -> None:
        names = ", ".join(repr(site.name) for site in sites)
        warnings.warn(
            f"No gradient of {names} has come before step {self.step + 1}, after which connections "
            "were to move: nothing moves. If several optimizers step the model, give them all.",
            stacklevel=2,
        )

    def _warn_dead(self) -> None:
        dead = [repr(site.name) for site in self.sites if site.connections.count == 0]
        if dead:
            warnings.warn(
                f"No connection is left of {', '.join(dead)} at step {self.step}: give each layer "
                "a budget of its own, with allocation='er'.",
                stacklevel=2,
            )

    # Small parts --------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {
            "method": self.method.settings(),
            "total_steps": self.total_steps,
            "budgets": self._budgets(self._shares),
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


def _weight(name: str, layer: SparseLayer) -> SparseWeight:
    full = f"{name}.values" if name else "values"
    return SparseWeight(full, layer.values, full_shape=layer.weight_shape)


def _site(weight: SparseWeight, layer: SparseLayer) -> SparseSite:
    keys = layer.connections.keys()
    return SparseSite(weight, layer, keys, torch.zeros_like(keys, dtype=torch.int32))
