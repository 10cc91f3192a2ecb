"""The sparsifier of the growth methods: connections move, weights are never dense."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from spartan.always_sparse.conversion import sparse_layers
from spartan.always_sparse.growth import (
    Growth,
    SparseSite,
    SparseWeight,
    is_in,
    largest,
    processes,
)
from spartan.always_sparse.layer import SparseLayer
from spartan.always_sparse.moving import Move, apply
from spartan.always_sparse.product import Passes
from spartan.budget import Budget
from spartan.errors import (
    BudgetError,
    MethodError,
    NonFiniteError,
    PatternError,
    PrunableError,
    StateError,
)
from spartan.kernels import finite
from spartan.optimizer_steps import check_optimizers, skips_step
from spartan.patterns import Pattern, Unstructured
from spartan.prunable import NameFilter
from spartan.shares import Share
from spartan.sparsifier import Sparsifier, named
from spartan.summary import LayerSummary

_STATE_VERSION = 1


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
        self._check_request(layers, include, exclude)
        weights = [_weight(name, layer) for name, layer in layers.items()]
        self._shares = budget.plan(model, weights, self.pattern)
        check_optimizers(self._optimizers, weights)
        for weight in weights:
            if not bool(torch.isfinite(weight.parameter).all()):
                raise NonFiniteError(f"The weight {weight.name!r} holds NaN or infinity.")
        self.sites = [
            _site(weight, layer) for weight, layer in zip(weights, layers.values(), strict=True)
        ]
        self._check_counts()
        self._steppers: list[Optimizer] = []  # those that have stepped, where none was given
        self._listen()
        self._handles = self._hook_steps()

    def _check_request(
        self, layers: Mapping[str, SparseLayer], include: object, exclude: object
    ) -> None:
        if not layers:
            raise PrunableError(
                f"{self.method.name!r} moves the connections of always-sparse layers, and the "
                "model has none: build it with always_sparse.SparseLinear, or call "
                "always_sparse.convert(model, density) before making the optimizer."
            )
        if include is not None or exclude is not None:
            raise PrunableError(
                "Growth governs all always-sparse layers: name layers in always_sparse.convert."
            )
        if not isinstance(self.pattern, Unstructured):
            raise PatternError(
                f"{self.method.name!r} grows single connections, not {self.pattern}."
            )
        if self.budget.cost != "parameters" or self.budget.latency_ms is not None:
            raise BudgetError("Growth keeps a number of connections: only cost='parameters' goes.")
        if self.budget.count != "prunable":
            raise BudgetError(
                "Growth counts always-sparse layers only: count='prunable' it must be."
            )
        if self.method.moves and any(isinstance(o, LBFGS) for o in self._optimizers):
            raise MethodError(
                "LBFGS keeps a history that is not one number a weight, so it cannot follow moving "
                "connections; use another optimizer."
            )

    def _check_counts(self) -> None:
        """Raise unless the layers hold what the budget says."""
        for share in self._shares:
            sites = [self.sites[i] for i in share.members]
            found = sum(site.connections.count for site in sites)
            if found != share.kept:
                names = "the layers" if len(sites) > 1 else repr(sites[0].name)
                raise BudgetError(
                    f"The budget is {share.kept:,} connections of {names}, and there are "
                    f"{found:,}: give Budget(density={self.density:.10g}), or convert the "
                    f"model with the density and the allocation {self.budget.allocation!r} of the "
                    "budget. (With 'global', they may be spread in any way.)"
                )
            if len(sites) > 1 and processes() > 1 and self.method.moves:
                raise BudgetError(
                    "In several processes the connections of each layer must keep their number: "
                    "use allocation='er', 'erk' or 'uniform'."
                )

    # What the user asks -------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Connections as a fraction of all pairs."""
        kept = sum(site.connections.count for site in self.sites)
        return kept / sum(site.weight.numel for site in self.sites)

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
        for site in self.sites:
            site.layer.passes = None

    def state_dict(self) -> dict[str, Any]:
        self._require_attached()
        sites = {s.name: {"tried": s.tried, "rounds": s.rounds} for s in self.sites}
        return {
            "version": _STATE_VERSION,
            "settings": self._settings(),
            "step": self.step,
            "sites": sites,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; the model's own state, with the connections, is loaded before."""
        self._require_attached()
        self._check_state(state)
        self._check_counts()
        self.step = int(state["step"])
        for site in self.sites:
            saved = state["sites"][site.name]
            device = site.tried.device
            site.tried = saved["tried"].to(device, copy=True)
            site.rounds = saved["rounds"].to(device, copy=True)
        self._listen()

    # Around a step ------------------------------------------------------------------------------

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        weights = self._steps(optimizer)
        if not weights:
            return
        self._refuse_more_steps(optimizer)
        if not skips_step(optimizer):
            self._require_finite(weights)

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
            apply(move, self._steppers, self.method.counts_rounds)
        self._listen()
        if moves:
            self._warn_dead()

    def _finite(self) -> list[bool]:
        return finite([site.weight.parameter.detach() for site in self.sites])

    def _moves(self, step: int) -> Iterator[Move]:
        """Choose what is grown and pruned after a step; nothing is changed yet."""
        fraction = self.method.fraction_at(step, self._horizon)
        for share in self._shares if fraction > 0 else []:
            sites = [self.sites[i] for i in share.members]
            if self.method.uses_gradients:
                sites = [site for site in sites if site.passes]
            total = sum(site.connections.count for site in sites)
            if len(sites) == len(share.members) and total != share.kept:
                raise StateError(
                    f"The layers hold {total:,} connections, and the budget is {share.kept:,}: "
                    "something else has changed them since the sparsifier was made."
                )
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
        fraction = self.method.fraction_at(self.step + 1, self._horizon)
        needed = self.method.uses_gradients and fraction > 0
        for site in self.sites:
            site.layer.passes = Passes() if needed else None

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

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if state.get("version") != _STATE_VERSION or "sites" not in state:
            raise StateError("The state is not one of a growth method, or of another version.")
        for key, value in self._settings().items():
            if state["settings"].get(key) != value:
                raise StateError(
                    f"The state was saved with {key}={state['settings'].get(key)}, this sparsifier "
                    f"has {key}={value}: resume with the settings the run was begun with."
                )
        names = {site.name for site in self.sites}
        if set(state["sites"]) != names:
            other = ", ".join(sorted(set(state["sites"]) ^ names))
            raise StateError(f"The state is of another model; it differs in {other}.")
        for site in self.sites:
            saved = state["sites"][site.name]
            tried = saved["tried"].to(site.tried.device)
            if not bool(is_in(site.connections.keys(), tried).all()):
                raise StateError(
                    f"The connections of {site.name!r} are not those of the state: load the "
                    "model's state dict first, and of the same step."
                )


def _weight(name: str, layer: SparseLayer) -> SparseWeight:
    full = f"{name}.values" if name else "values"
    return SparseWeight(full, layer.values, full_shape=layer.weight_shape)


def _site(weight: SparseWeight, layer: SparseLayer) -> SparseSite:
    keys = layer.connections.keys()
    return SparseSite(weight, layer, keys, torch.zeros_like(keys, dtype=torch.int32))
