"""`Carrier`: the state of a run rides in the state dict of its optimizer, and comes back with it.

Whoever saves the model and the optimizer has saved the run, in a loop that knows nothing of it. The
state lies in the first parameter group of the state dict, under "spartan" and a key of its own:
several sparsifiers may share an optimizer. Torch hands on whatever a group holds. So the state
arrives also where an optimizer is loaded before there is a sparsifier, or by a `load_state_dict`
that calls no hooks, and waits in the group until the next step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spartan.errors import StateError
from spartan.sparsifier.old_states import understood
from spartan.sparsifier.optimizers import nested
from spartan.sparsifier.steps import OptimizerSteps
from spartan.weights.prunable import Prunable

_KEY = "spartan"

Continue = Callable[[], None]


class CarriedRun(Protocol):
    """What of a run a carrier needs."""

    @property
    def steps(self) -> OptimizerSteps:
        """Its steps."""

    @property
    def first_weight(self) -> Prunable:
        """The first of its weights."""

    @property
    def connections_exchanged(self) -> bool:
        """Whether the model has other connections than the run knows."""

    def snapshot(self) -> dict[str, Any]:
        """Return its state, and leave it as it is."""

    def prepare(self, state: Mapping[str, Any]) -> Continue:
        """Check a state, and return what continues from it."""


class Carrier:
    """Puts the state of a run into what its first optimizer saves, and takes it from what it loads.

    Optimizers that wrap others, and those that are wrapped, all carry: some save for the other.

    Args:
        run: The run.

    Raises:
        StateError: An optimizer brings a state that does not fit.
    """

    def __init__(self, run: CarriedRun) -> None:
        self._run = run
        self._key: str | None = None
        self._handles: list[RemovableHandle] = []
        self._boarded: list[Optimizer] = []
        self._loading: Continue | None = None  # what the optimizer is loading just now
        self._waiting: Continue | None = None  # for the model's own state, which comes later
        self._again: Continue | None = None  # should the model's connections come later
        self._bare = False  # a state was loaded that carried nothing
        self._just_loaded = False  # since the last step: what lies in a group is the same
        run.steps.companion = self
        for optimizer in run.steps.optimizers[:1]:
            self._board(optimizer)

    def leave(self) -> None:
        """Take the hooks away: the run is over."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._waiting, self._again = [], None, None

    def arrive(self) -> None:
        """Before a step: see that what was loaded is in place, and who carries from here on."""
        for carrier in self._run.steps.steppers[:1]:
            if any(carrier is known for known in self._boarded):
                self._take_brought()
            else:  # met in this step, or it took the place of another
                self._board(carrier)
        self._continue_waiting()
        self._just_loaded, self._again = False, None
        if self._bare and self._run.steps.total is not None:
            self._bare = False
            warnings.warn(
                "The optimizer's state that was loaded carries no sparsifier's: the schedule and "
                f"the masks go on from step {self._run.steps.done}. To resume a run, load the "
                "sparsifier's state too; to prune a trained model, load before the sparsifier is "
                "made.",
                stacklevel=5,
            )

    def loaded(self) -> None:
        """Take note that the run continues from a state that came by another way."""
        self._loading = self._waiting = self._again = None
        self._bare, self._just_loaded = False, True

    def strip(self) -> None:
        """Take what was loaded out of the optimizers, and never look at it again."""
        for group in self._groups():
            _strip(group, self._key)

    def _board(self, optimizer: Optimizer) -> None:
        """Let the state ride in an optimizer from here on, and take what it brings."""
        if self._key is None:
            self._key = _key_in(optimizer, self._run.first_weight)
        for one in nested(optimizer):
            if any(one is known for known in self._boarded):
                continue
            self._boarded.append(one)
            # Wrappers that never called Optimizer.__init__ have no hooks, and save what they wrap.
            if hasattr(one, "_optimizer_state_dict_post_hooks"):
                self._handles += [
                    one.register_state_dict_post_hook(self._save),
                    one.register_load_state_dict_pre_hook(self._before_load),
                    one.register_load_state_dict_post_hook(self._after_load),
                ]
        self._take_brought()

    def _groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups in which a state lies."""
        every = nested(*self._boarded, *self._run.steps.steppers)
        return [group for one in every for group in one.param_groups if _KEY in group]

    def _take_brought(self) -> None:
        """Continue from what lies in a parameter group of an optimizer."""
        groups = self._groups()
        found = self._own(groups)
        if found is not None:
            there = self._just_loaded and found.get("step") == self._run.steps.done
            if not there:
                with _way_to_begin_anew():
                    self._go_on(self._run.prepare(found))
            for group in groups:
                _strip(group, self._key)

    def _own(self, groups: Sequence[Mapping[str, Any]]) -> Any:
        """Return the run's state; if there is only another one, and nobody else to take it, that.

        It does not fit, which says why.
        """
        states = {key: state for group in groups for key, state in dict(group[_KEY]).items()}
        alone = not any(_carriers(one) - {id(self)} for one in self._boarded)
        other = next(iter(states.values()), None) if alone else None
        return states.get(self._key, other)

    # In the optimizer's own methods --------------------------------------------------------------

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        groups = state_dict.get("param_groups")
        # Within a step it is the optimizer that takes note of itself, and the run goes on.
        if groups and not self._run.steps.is_within_one:
            self._continue_waiting()
            others = groups[0].get(_KEY, {})
            own = {self._key: self._run.snapshot()}
            state_dict["param_groups"] = [{**groups[0], _KEY: {**others, **own}}, *groups[1:]]

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._loading = None
        if not self._run.steps.is_within_one:
            groups = [group for group in state_dict.get("param_groups", []) if _KEY in group]
            found = self._own(groups)
            self._bare = found is None
            if found is not None:
                self._loading = self._run.prepare(found)

    def _after_load(self, optimizer: Optimizer) -> None:
        # The state stays in the group until the next step: should a new sparsifier be made for
        # what was loaded, it goes on from there.
        if self._loading is not None:
            continuing, self._loading = self._loading, None
            self._go_on(continuing)

    def _go_on(self, continuing: Continue) -> None:
        try:
            continuing()
        except StateError:  # the model's own state may be loaded after the optimizer's
            self._waiting = continuing
        else:
            self.loaded()
            self._again = continuing

    def _continue_waiting(self) -> None:
        again = self._again if self._run.connections_exchanged else None
        continuing = self._waiting or again
        if continuing is not None:
            continuing()
            self.loaded()


def _key_in(optimizer: Optimizer, weight: Prunable) -> str:
    """Return a key that another run with this optimizer does not have.

    Networks alike may share an optimizer, so a name is not enough.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    places = [str(i) for i, p in enumerate(parameters) if p is weight.parameter]
    return f"{weight.name} at {places[0]}" if places else weight.name


def _carriers(optimizer: Optimizer) -> set[int]:
    """Return the ids of the carriers whose states ride in an optimizer."""
    hooks: Any = getattr(optimizer, "_optimizer_state_dict_post_hooks", {})
    owners = [getattr(hook, "__self__", None) for hook in hooks.values()]
    return {id(owner) for owner in owners if isinstance(owner, Carrier)}


def _strip(group: dict[str, Any], key: str | None) -> None:
    """Take a state out of a parameter group; without a key, whatever there is."""
    states = group.pop(_KEY, {})  # wrappers share groups with what they wrap
    left = {k: state for k, state in states.items() if k != key} if key is not None else {}
    if left:
        group[_KEY] = left


def brings_state(optimizers: Iterable[Optimizer]) -> bool:
    """Say whether an optimizer was loaded with the state of a run."""
    return any(_KEY in group for one in nested(*optimizers) for group in one.param_groups)


def steps_brought(optimizers: Iterable[Optimizer]) -> int | None:
    """Return for how many steps the run was begun that optimizers were loaded with, if any."""
    groups = [g for one in nested(*optimizers) for g in one.param_groups if _KEY in g]
    with understood():
        states = [state for group in groups for state in group[_KEY].values()]
        totals: list[int | None] = [state["settings"]["total_steps"] for state in states]
    return totals[0] if totals else None


def ignore_brought(optimizers: Iterable[Optimizer]) -> None:
    """Drop the states that optimizers were loaded with, and that no run with them takes."""
    every = nested(*optimizers)
    if not any(_carriers(one) for one in every):
        for group in (group for one in every for group in one.param_groups if _KEY in group):
            _strip(group, None)


@contextmanager
def _way_to_begin_anew() -> Iterator[None]:
    try:
        yield
    except StateError as error:
        raise StateError(
            f"{error} The state came with the optimizer; to begin another run with it, make the "
            "sparsifier with checkpoint_with=None, or del optimizer.param_groups[0]['spartan']."
        ) from None


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put back the values of all parameters if an exception is raised."""
    before = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, values in before:
                parameter.copy_(values)
        raise
