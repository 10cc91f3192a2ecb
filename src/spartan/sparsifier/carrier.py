"""`Carrier`: the state of a run rides in the state dict of its optimizer, and comes back with it.

Whoever saves the model and the optimizer has saved the run, in a loop that knows nothing of it. The
state lies in the first parameter group of the state dict, under "spartan" and the name of the first
weight: several sparsifiers may share an optimizer. Torch hands on whatever a group holds. So the
state arrives also where an optimizer is loaded before there is a sparsifier, or by a
`load_state_dict` that calls no hooks.
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

_KEY = "spartan"

Continue = Callable[[], None]


class CarriedRun(Protocol):
    """What of a run a carrier needs."""

    @property
    def steps(self) -> OptimizerSteps:
        """Its steps."""

    @property
    def names(self) -> Sequence[str]:
        """The names of its weights."""

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""

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
        self._run, self._name = run, run.names[0]
        self._handles: list[RemovableHandle] = []
        self._boarded: list[Optimizer] = []
        self._loading: Continue | None = None  # what the optimizer is loading just now
        self._waiting: Continue | None = None  # for the state of the model, which comes later
        self._bare = False  # a state was loaded that carried nothing
        self._just_loaded = False  # since the last step: sharded optimizers bring it once more
        for optimizer in run.steps.optimizers[:1]:
            self._board(optimizer)
        run.steps.companion = self

    def leave(self) -> None:
        """Take the hooks away: the run is over."""
        for handle in self._handles:
            handle.remove()

    def arrive(self) -> None:
        """Before a step: see that what was loaded is in place, and who carries from here on."""
        for carrier in self._run.steps.steppers[:1]:
            if any(carrier is known for known in self._boarded):
                self._take_brought()
            else:  # met in this step, or it took the place of another
                self._board(carrier)
        self._continue_waiting()
        self._just_loaded = False
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
        self._loading = self._waiting = None
        self._bare, self._just_loaded = False, True

    def _board(self, optimizer: Optimizer) -> None:
        """Let the state ride in an optimizer from here on, and take what it brings."""
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

    def _take_brought(self) -> None:
        """Continue from what lies in a parameter group of an optimizer."""
        groups = [group for one in self._boarded for group in one.param_groups if _KEY in group]
        if groups:
            found = _own(groups, self._name)
            there = self._just_loaded and found.get("step") == self._run.steps.done
            continuing = None if there else self._run.prepare(found)
            for group in groups:
                _strip(group, self._name)
            if continuing is not None:
                self._go_on(continuing)

    # In the optimizer's own methods --------------------------------------------------------------

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        groups = state_dict.get("param_groups")
        # Within a step it is the optimizer that takes note of itself, and the run goes on.
        if groups and not self._run.steps.is_within_one:
            self._continue_waiting()
            others = groups[0].get(_KEY, {})
            own = {self._name: self._run.state_dict()}
            state_dict["param_groups"] = [{**groups[0], _KEY: {**others, **own}}, *groups[1:]]

    def _before_load(
        self, optimizer: Optimizer, state_dict: dict[str, Any]
    ) -> dict[str, Any] | None:
        self._loading = None
        if self._run.steps.is_within_one:
            return None
        groups = [dict(group) for group in state_dict.get("param_groups", [])]
        brought = [group for group in groups if _KEY in group]
        self._bare = not brought
        if not brought:
            return None
        self._loading = self._run.prepare(_own(brought, self._name))
        for group in brought:
            _strip(group, self._name)
        return {**state_dict, "param_groups": groups}

    def _after_load(self, optimizer: Optimizer) -> None:
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

    def _continue_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting()
            self.loaded()


def _own(groups: Sequence[Mapping[str, Any]], name: str) -> Any:
    """Return the state under a name; where there is none, another one, which will be refused."""
    states = {key: state for group in groups for key, state in dict(group[_KEY]).items()}
    return states.get(name, next(iter(states.values()), {}))


def _strip(group: dict[str, Any], name: str) -> None:
    """Take a state out of a parameter group."""
    left = {key: state for key, state in group.pop(_KEY).items() if key != name}
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
