"""The seam: everything a method does happens around `optimizer.step()`.

                     model sees            optimizer sees
 forward, backward   w = materialize(θ)
 before the step     grad_θ = pull_back(grad_w),  parameter ← θ
 optimizer.step                             θ ← θ - lr · …(grad_θ)
 after the step      masks ← select(θ);     parameter ← materialize(θ)

The parameter objects keep their identity; values are copied in place. No module is changed; under
methods that sample, the model has two hooks that show training passes their weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spartan.always_sparse.conversion import sparse_layers
from spartan.budget import Budget
from spartan.errors import MethodError, NonFiniteError, StateError
from spartan.methods.base import Method
from spartan.methods.groups import make_group, require_finite
from spartan.methods.sites import Site
from spartan.optimizer_steps import (
    check_optimizers,
    loss_scale,
    parameters_of,
    skips_step,
    wrap_closure,
)
from spartan.passes import PassHook
from spartan.patterns import Pattern
from spartan.prunable import NameFilter, find_prunable
from spartan.shares import Share
from spartan.sparsifier import Sparsifier, named
from spartan.state import STATE_VERSION, check_state, restore, state_of
from spartan.summary import LayerSummary, summarize_masks
from spartan.writer import WeightWriter


class MaskingSparsifier(Sparsifier):
    """The sparsifier of the methods that mask dense weights.

    Between steps every prunable parameter holds w, exactly sparse (methods that sample show other
    weights to training passes, see `Method.samples`); inside `optimizer.step()` it holds the latent
    θ. Parameters in which something else writes between steps (loading weights, averaging) are
    noticed at the next step: the written values become the new θ, with a warning.
    Writes through `.data` escape notice, as they do autograd.
    A step whose gradients or weights are not finite raises before it does harm, and names itself.
    """

    method: Method
    sites: list[Site]

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer] | None,
        method: Method,
        budget: Budget,
        total_steps: int | None,
        pattern: Pattern | None = None,
        include: NameFilter | None = None,
        exclude: NameFilter | None = None,
    ) -> None:
        super().__init__(model, optimizer, method, budget, total_steps, pattern)
        self.method = method
        if sparse_layers(model):
            raise MethodError(
                f"{method.name!r} masks dense weights, and the model has always-sparse layers: use "
                "'gse', 'set', 'rigl', 'dst-ee' or 'static', or make them dense with "
                "always_sparse.to_dense."
            )
        weights = find_prunable(model, include, exclude)
        shares = budget.plan(model, weights, self.pattern)
        check_optimizers(self._optimizers, weights)
        for weight in weights:
            if not bool(torch.isfinite(weight.parameter).all()):
                raise NonFiniteError(f"The weight {weight.name!r} holds NaN or infinity.")

        self.groups = [make_group(share, weights, self.pattern) for share in shares]
        by_name = {site.name: site for group in self.groups for site in group.sites}
        self.sites = [by_name[weight.name] for weight in weights]
        for site in self.sites:
            site.latent.copy_(method.to_latent(site, site.latent))
        self._writer = WeightWriter(method, self.sites)
        self._inside: list[Site] = []  # sites whose parameter holds θ: a step is under way
        self._guards: list[RemovableHandle] = []
        self._checked_dead = False
        self._mark_active()
        if self.method.moves_masks(0, self._horizon):
            self.method.select(self.groups, 0, self._horizon)
        self._writer.write(self.sites)
        self._warn_dead()
        self._handles = self._register_hooks()

    # What the user asks -------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Kept fraction of the prunable weights, counted in the masks."""
        kept = sum(s.kept * self.pattern.unit_numel(s.weight) for s in self.sites)
        return kept / sum(s.weight.parameter.numel() for s in self.sites)

    def layers(self) -> list[LayerSummary]:
        """Return what each prunable weight keeps, in the order of the model."""
        return summarize_masks(self.groups, self.pattern)

    def monitor(self) -> dict[str, float]:
        """Return density and the method's numbers, averaged over groups."""
        rows = [self.method.monitor(group) for group in self.groups]
        keys = {key for row in rows for key in row}
        means = {key: sum(row[key] for row in rows) / len(rows) for key in sorted(keys)}
        return {"density": self.density, **means}

    def shares(self) -> list[tuple[str, Share]]:
        """Return the budget of each group."""
        return [(named([s.name for s in group.sites]), group.share) for group in self.groups]

    def progress_after(self, step: int) -> float:
        """Say how far the density has come after a step."""
        return self.method.progress(step, self._horizon)

    def moves_after(self, step: int) -> bool:
        """Say whether masks are selected after a step."""
        return self.method.moves_masks(step, self._horizon)

    def selected(self) -> dict[str, Tensor]:
        """Return the masks."""
        return {site.name: site.mask.clone() for site in self.sites}

    def churn(self, before: Mapping[str, Tensor]) -> float:
        """Return the share of all units whose mask has changed since."""
        changed = sum(int((site.mask != before[site.name]).sum()) for site in self.sites)
        return changed / sum(site.mask.numel() for site in self.sites)

    def finalize(self) -> None:
        """Leave plain, exactly sparse weights and no hook; the sparsifier is done.

        Called before the schedule has reached the budget, it selects once more, at the budget.
        """
        self._require_attached()
        self._leave_step()
        for site in self.sites:
            site.active = True
        if any(self._writer.was_overwritten(site) for site in self.sites):
            raise StateError(
                "Weights were written outside the optimizer since the last step; call finalize() "
                "first and load other weights after it."
            )
        if not self._at_budget() or self.method.samples(self.step, self._horizon):
            warnings.warn(
                f"finalize() at step {self.step} of {self.total_steps}, before the schedule "
                "reached the budget: the rest is pruned at once.",
                stacklevel=2,
            )
            self.method.select(self.groups, self._horizon, self._horizon)
        self._writer.write(self.sites)
        self._end_step()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for site in self.sites:
            site.latent = torch.empty(0)

    def state_dict(self) -> dict[str, Any]:
        self._require_attached()
        self._leave_step()
        return {
            "version": STATE_VERSION,
            "settings": self._settings(),
            "step": self.step,
            "sites": {site.name: state_of(site) for site in self.sites},
            "groups": [dict(group.numbers) for group in self.groups],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; also writes the sparse weights into the model."""
        self._require_attached()
        measured = self.budget.latency_ms is not None
        check_state(state, self._settings(), self.sites, len(self.groups), measured)
        self._end_step()
        self.step = int(state["step"])
        for site in self.sites:
            restore(site, state["sites"][site.name])
        for group, numbers in zip(self.groups, state["groups"], strict=True):
            group.numbers = dict(numbers)
        if self.budget.latency_ms is not None:
            # What was measured when the run was begun, not what was measured again just now.
            for group, (kept, total, *costs) in zip(
                self.groups, state["settings"]["budgets"], strict=True
            ):
                group.adopt(Share(group.share.members, tuple(costs), total, kept))
        self._writer.write(self.sites)

    # Around a step ------------------------------------------------------------------------------

    def _register_hooks(self) -> list[Any]:
        passes: list[Any] = []
        if self.method.samples(0, self._horizon):
            shown, saved = (
                PassHook(self.model, f) for f in (self._before_pass, self._before_saving)
            )
            passes.append(self.model.register_forward_pre_hook(shown))
            passes.append(self.model.register_state_dict_pre_hook(saved))
        return passes + self._hook_steps()

    @torch.no_grad()
    def _before_pass(self, training: bool) -> None:
        """Let a training pass see sampled weights, and every other one the plain w."""
        self._leave_step()
        self._writer.adopt(self.sites, self.step)
        if training and self.method.samples(self.step, self._horizon):
            self._writer.write_sample(self.sites, self.step)
        elif any(site.sampled for site in self.sites):
            self._writer.write(self.sites)

    def _before_saving(self, training: bool) -> None:
        self._before_pass(training=False)

    @torch.no_grad()
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        sites = self._sites_of(optimizer)
        if not sites:
            return None
        self._leave_step()
        self._refuse_more_steps(optimizer)
        self._writer.adopt(self.sites, self.step)
        for site in sites if self.method.samples(self.step, self._horizon) else []:
            site.loss_scale = loss_scale(optimizer)
        args, kwargs, wrapped = wrap_closure(args, kwargs, lambda f: self._closure(f, sites))
        if not wrapped:
            self._pull_back(sites, skipped=skips_step(optimizer))
        self._guard_model()
        self._show_theta(sites)
        return (args, kwargs) if wrapped else None

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        sites = self._inside
        if not sites or self._sites_of(optimizer) != sites:
            return
        if skips_step(optimizer):
            self._leave_step()
            return
        completes = self._completes_step(optimizer)
        moves = completes and self.method.moves_masks(self.step + 1, self._horizon)
        try:
            if not (moves and self.method.checks_weights):
                require_finite(sites)
            if moves:
                self.method.select(self.groups, self.step + 1, self._horizon)
        except BaseException as error:
            self._leave_step()
            if isinstance(error, NonFiniteError):
                raise NonFiniteError(f"Step {self.step + 1}: {error}") from None
            raise
        # From here on, whatever interrupts leaves the step as a step that was done.
        self.step += completes
        written = self.sites if moves else sites
        try:
            self._writer.write(written)
        except BaseException:
            self._writer.write(written)
            raise
        finally:
            self._end_step()
        if moves:
            self._warn_dead()

    def _closure(self, closure: Callable[[], Any], sites: list[Site]) -> Callable[[], Any]:
        """Wrap a closure so that it sees w, and the optimizer the gradient of θ."""

        def evaluate() -> Any:
            with torch.no_grad():
                self._writer.write(sites)
            self._inside = []  # if the closure raises, the model holds w already
            loss = closure()
            with torch.no_grad():
                self._pull_back(sites)
                self._show_theta(sites)
            return loss

        return evaluate

    def _pull_back(self, sites: list[Site], skipped: bool = False) -> None:
        for site in sites:
            site.active = site.grad is not None
        active = [site for site in sites if site.active]
        if not skipped:
            self._require_finite([site.weight for site in active])
        chosen = set(map(id, active))
        for group in self.groups:
            members = [site for site in group.sites if id(site) in chosen]
            if members:
                self.method.pull_back(group, members, self.step, self._horizon)

    def _show_theta(self, sites: list[Site]) -> None:
        """Let the parameters hold θ, for the optimizer to move."""
        self._inside = sites
        for site in sites:
            site.weight.parameter.copy_(site.latent)
            site.stepping = True

    def _warn_dead(self) -> None:
        """Say once, when the budget is first reached, which layers keep nothing."""
        if self._checked_dead or self.method.progress(self.step, self._horizon) < 1.0:
            return
        self._checked_dead = True
        dead = [site.name for site in self.sites if not bool(site.mask.any())]
        if dead:
            warnings.warn(
                f"Nothing is kept of {', '.join(map(repr, dead))} at step {self.step}. Weights can "
                "come back while masks move; if these do not, spread the budget with "
                "allocation='erk' or 'uniform', or exclude them.",
                stacklevel=2,
            )

    def _leave_step(self) -> None:
        """Restore w where a step was begun and did not end, by an exception or a skip."""
        if self._inside:
            inside = self._inside
            self._end_step()
            self._writer.write(inside)

    def _guard_model(self) -> None:
        """Heal the model before it is used, should the step that begins now never end.

        The hooks are there during a step only, where nobody runs or saves the model.
        """
        self._remove_guards()
        self._guards = [
            self.model.register_forward_pre_hook(lambda *_: self._leave_step()),
            self.model.register_state_dict_pre_hook(lambda *_: self._leave_step()),
        ]

    def _end_step(self) -> None:
        """Forget the step that is under way, if one is, and what was selected in it."""
        self._inside = []
        for site in self.sites:
            site.stepping, site.choice = False, None
        self._remove_guards()

    def _remove_guards(self) -> None:
        for guard in self._guards:
            guard.remove()
        self._guards = []

    # Small parts --------------------------------------------------------------------------------

    def _sites_of(self, optimizer: Optimizer) -> list[Site]:
        stepped = set(map(id, self._steps(optimizer)))
        return [site for site in self.sites if id(site.weight) in stepped]

    def _mark_active(self) -> None:
        """Weights that no optimizer steps keep the masks they get when the budget is reached."""
        stepped = set().union(*map(parameters_of, self._optimizers))
        for site in self.sites:
            site.active = not self._optimizers or id(site.weight.parameter) in stepped

    def _at_budget(self) -> bool:
        return all(group.kept <= group.share.kept for group in self.groups)

    def _settings(self) -> dict[str, Any]:
        return {
            "method": self.method.settings(),
            "pattern": str(self.pattern),
            "total_steps": self.total_steps,
            "latency_ms": self.budget.latency_ms,
            "budgets": self._budgets(group.share for group in self.groups),
        }
