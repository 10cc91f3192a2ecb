"""The contract of methods that mask dense weights: what a method says, and what it is given.

The sparsifier owns the parameters, the optimizer hooks and the step counter. A method says

* when masks move, and how far the density has come (`moves_masks`, `progress`),
* which units the masks keep (`select`),
* how the latent weight θ becomes the weight w the model computes with (`materialize`), and comes
  from the weights the model begins with (`to_latent`),
* how the gradient of w becomes the gradient of θ (`pull_back`).

It sees groups: a `MaskedWeight` is one prunable weight, a `BudgetGroup` the weights that share one
budget. Methods are frozen dataclasses of settings; whatever changes during a run lives in the
states of weights and groups (`weight_state`, `group_state`), from where the sparsifier saves it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from spartan import kernels
from spartan.errors import MethodError
from spartan.kernels import units
from spartan.kernels.scores import wide
from spartan.methods.masking.groups import BudgetGroup
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.methods.masking.state import GroupState, WeightState
from spartan.methods.masking.writing import write_given, write_kept
from spartan.registry import Registered


class MaskingMethod(Registered, ABC):
    """Base of the methods that mask weights."""

    checks_weights: ClassVar[bool] = False  # whether `select` refuses weights that are not finite
    weight_state: ClassVar[type[WeightState]] = WeightState  # what it keeps of each weight
    group_state: ClassVar[type[GroupState]] = GroupState  # and of each group
    learns_rates: ClassVar[bool] = False  # whether it finds by itself how layers share a budget
    rates_only: ClassVar[bool] = False  # whether it takes no allocation but its own
    finds_masks: ClassVar[bool] = True  # or holds those that are there

    @abstractmethod
    def moves_masks(self, step: int, total_steps: int) -> bool:
        """Say whether the masks are selected anew after `step` (0: when attached)."""

    @abstractmethod
    def progress(self, step: int, total_steps: int) -> float:
        """Say how far the density has come after `step`: from everything, 0, to the budget, 1."""

    @abstractmethod
    def select(self, groups: Sequence[BudgetGroup], step: int, total_steps: int) -> None:
        """Choose what the masks of all groups keep, from their latent weights.

        Set `weight.mask`, or call `keep_largest`. At `step == total_steps` the masks must meet the
        target budget.
        """

    @abstractmethod
    def pull_back(
        self, group: BudgetGroup, weights: Sequence[MaskedWeight], step: int, total_steps: int
    ) -> None:
        """Turn the gradients of w into gradients of θ, in place.

        Args:
            group: The group of the weights.
            weights: Its weights that have a gradient and are about to be stepped.
            step: Steps completed so far.
            total_steps: Steps of the whole run.
        """

    def materialize(self, weight: MaskedWeight) -> Tensor:
        """Return w, with exact zeros in pruned units. Default: θ where kept."""
        return torch.where(weight.spread(weight.mask), weight.theta, 0.0)

    def write(self, weights: Sequence[MaskedWeight]) -> None:
        """Write w into the parameters, and θ into the latent weights where those are behind."""
        if type(self).materialize is MaskingMethod.materialize:
            write_kept(weights)
        else:
            write_given(weights, self.materialize)

    def samples(self, step: int, total_steps: int) -> bool:
        """Say whether training passes after `step` compute with random weights; see `write_sample`.

        From a training pass to the step after it, or to the next pass of another kind or the next
        state dict, the parameters hold them; otherwise what `write` wrote.
        """
        return False

    def write_sample(self, weights: Sequence[MaskedWeight], step: int) -> None:
        """Write the w that training passes of one step compute with, and set `weight.sampled`."""
        raise NotImplementedError

    def to_latent(self, weight: MaskedWeight, w: Tensor) -> Tensor:
        """Return the θ that gives this w where it is kept."""
        return w

    def lacks(self, weight: MaskedWeight, step: int, total_steps: int) -> str | None:
        """Say what is missing in the restored state of a weight to go on after `step`; or None."""
        return None

    def is_soft(self, weight: MaskedWeight) -> bool:
        """Say whether kept weights are multiplied by a soft mask, or a gate, in training."""
        return False

    def with_max_layer_sparsity(self, most: float) -> Self:
        """Return the method with a bound on what a layer may lose, if it learns rates.

        Raises:
            MethodError: It knows no such bound.
        """
        if most < 1.0:
            raise MethodError(f"{self.name!r} knows no max_layer_sparsity; 'fcpts' does.")
        return self

    def monitor(self, group: BudgetGroup) -> dict[str, float]:
        """Return numbers worth logging for a group."""
        return {}


def scale_gradients(weights: Sequence[MaskedWeight], factors: Sequence[Tensor]) -> None:
    """Multiply the gradients by one factor for each unit, in place."""
    if not weights:
        return
    if all(weight.elementwise for weight in weights):
        torch._foreach_mul_([weight.required_grad for weight in weights], list(factors))
        return
    for weight, factor in zip(weights, factors, strict=True):
        grad = weight.required_grad
        units.scale(grad, factor, None, grad, weight.grid)


def mask_gradients(weights: Sequence[MaskedWeight], masks: Sequence[Tensor]) -> None:
    """Zero the gradients outside the masks (one boolean per unit), in place."""
    if all(weight.elementwise for weight in weights):
        kernels.mask_([weight.required_grad for weight in weights], masks)
        return
    for weight, mask in zip(weights, masks, strict=True):
        grad = weight.required_grad
        units.scale(grad, mask.to(wide(grad[:0]).dtype), None, grad, weight.grid)
