"""`Watch`: notices what goes past a sparsifier: parameters exchanged, weights trained otherwise."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spartan.errors import StateError, some_of
from spartan.kernels.memory import sample
from spartan.weights.prunable import Prunable

# Weights that change three times between backward passes, in ten or more of them, and in three
# times as many as there ever were before a step, are trained otherwise. Accumulated gradients
# change none, and whoever perturbs weights (SAM) or clips them does so once or twice.
_CHANGES, _PASSES, _LONGER = 3, 10, 3
_LOOKED_UP = (1, 3, 10, 30, 100, 300, 1000)  # steps of other optimizers
_BY_STEP = 4  # parameters looked up in each step, in turn: a few microseconds each
_ALL_STEPS = 3  # in so many first steps all are looked up


class Watch:
    """Watches over the parameters that a sparsifier governs.

    Args:
        model: The model.
        weights: The weights that are governed.
        changed: Returns the names of those that others have written since the last step.
    """

    def __init__(
        self, model: nn.Module, weights: Sequence[Prunable], changed: Callable[[], list[str]]
    ) -> None:
        self._model, self._weights, self._changed = model, weights, changed
        paths = {id(parameter): path for path, parameter in model.named_parameters()}
        self._paths = [paths[id(weight.parameter)] for weight in weights]
        self._next = 0
        self._steps = self._passes = self._other_steps = 0
        self._longest = self._changes = 0  # passes before a step, at most; changes since the last
        self._seen: Tensor | None = None
        self._said = False
        trained = [weight.parameter for weight in weights if weight.parameter.requires_grad]
        self._listener: Any = None
        if trained:
            self._listener = trained[0].register_post_accumulate_grad_hook(_weakly(self))

    def stop(self) -> None:
        """Stop watching."""
        if self._listener is not None:
            self._listener.remove()
            self._listener = None

    def gone(self, places: Sequence[int] | None = None) -> list[int]:
        """Return the places of weights that are no parameters of the model any more."""
        found = range(len(self._weights)) if places is None else places
        return [i for i in found if self._now_at(i) is not self._weights[i].parameter]

    def require_present(self) -> None:
        """Raise `StateError` unless the model still has all parameters that are governed."""
        self._refuse(self.gone())

    def step(self) -> None:
        """Take note that a step begins, and look at some of the parameters; at first at all.

        Raises:
            StateError: The model has other parameters now.
        """
        if self._steps < _ALL_STEPS:
            self.require_present()
        else:
            count = min(_BY_STEP, len(self._weights))
            self._refuse(self.gone([(self._next + i) % len(self._weights) for i in range(count)]))
            self._next = (self._next + count) % len(self._weights)
        self._steps += 1
        self._longest = max(self._longest, self._passes)
        self._passes = self._changes = self._other_steps = 0
        self._seen = None

    def other_step(self, optimizer: Optimizer) -> None:
        """Take note of a step of an optimizer that steps no governed weight.

        Raises:
            StateError: It steps what the model has in the place of one.
        """
        self._other_steps += 1
        if self._other_steps in _LOOKED_UP:
            stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
            self._refuse([i for i in self.gone() if id(self._now_at(i)) in stepped])

    def count_pass(self, parameter: Tensor) -> None:
        """Take note of a backward pass, and say so if weights are trained without a step."""
        self._passes += 1
        if self._passes > 1 and not self._said:
            now = sample(parameter.detach())
            changed = self._seen is not None and not torch.equal(now, self._seen)
            self._seen, self._changes = now, self._changes + changed
        if self._changes < _CHANGES or self._passes < max(_PASSES, _LONGER * self._longest):
            return
        names = [] if self._said else self._changed()
        if not names:
            return
        self._said = True
        warnings.warn(
            f"{some_of(names)} changed in {self._passes} backward passes, without a step of an "
            "optimizer that steps them: masks are not held, and no step is counted. Where copies "
            "of the weights are stepped, such as float32 masters, make the sparsifier for these; "
            "where the update is written by hand, let a torch.optim.Optimizer do it.",
            stacklevel=2,
        )

    def _now_at(self, place: int) -> nn.Parameter | None:
        """Return the parameter that has the name of a weight now, if any has."""
        module: Any = self._model
        *path, key = self._paths[place].split(".")
        for name in path:
            module = module._modules.get(name)
            if module is None:
                return None
        found: nn.Parameter | None = module._parameters.get(key)
        return found

    def _refuse(self, places: Sequence[int]) -> None:
        if places:
            shown = some_of(self._weights[i].name for i in places)
            raise StateError(
                f"The model has another parameter than the sparsifier in the place of {shown}, or "
                "none: a layer was exchanged or moved, a state was loaded with assign=True, or the "
                "model was wrapped or converted. Do so first, and make the optimizer and the "
                "sparsifier after it; finalize(keep='model') ends this one."
            )


def _weakly(watch: Watch) -> Callable[[Tensor], None]:
    """Return a hook that does not keep the model alive, as hooks of its tensors would."""
    found = weakref.ref(watch)

    def hook(parameter: Tensor) -> None:
        alive = found()
        if alive is not None:
            alive.count_pass(parameter)

    return hook
