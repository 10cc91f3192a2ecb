"""The contract between a method and the sparsifier.

The sparsifier owns the parameters, the optimizer hooks and the step counter. A method says

* when masks move, and how far the density has come (`moves_masks`, `progress`),
* which units the masks keep (`select`),
* how the latent weight θ becomes the weight w the model computes with (`materialize`), and comes
  from the weights the model begins with (`to_latent`),
* how the gradient of w becomes the gradient of θ (`pull_back`).

It sees groups of sites: a `Site` is one prunable weight, a `Group` is the sites that share one
budget. Methods are frozen dataclasses of settings; whatever changes during a run lives in the
sites and groups, from where the sparsifier saves it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from spartan import kernels
from spartan.described import Described
from spartan.kernels import units
from spartan.kernels.scores import wide
from spartan.methods.groups import Group
from spartan.methods.sites import Site
from spartan.methods.writing import write_given, write_kept


class Method(Described, ABC):
    """Base of the methods that mask weights."""

    checks_weights: ClassVar[bool] = False  # whether `select` refuses weights that are not finite

    @abstractmethod
    def moves_masks(self, step: int, total_steps: int) -> bool:
        """Say whether the masks are selected anew after `step` (0: when attached)."""

    @abstractmethod
    def progress(self, step: int, total_steps: int) -> float:
        """Say how far the density has come after `step`: from everything, 0, to the budget, 1."""

    @abstractmethod
    def select(self, groups: Sequence[Group], step: int, total_steps: int) -> None:
        """Choose what the masks of all groups keep, from their latent weights.

        Set `site.mask`, or call `keep_largest`. At `step == total_steps` the masks must meet the
        target budget.
        """

    @abstractmethod
    def pull_back(self, group: Group, sites: Sequence[Site], step: int, total_steps: int) -> None:
        """Turn the gradients of w into gradients of θ, in place.

        Args:
            group: Group of the sites.
            sites: Its sites that have a gradient and are about to be stepped.
            step: Steps completed so far.
            total_steps: Steps of the whole run.
        """

    def materialize(self, site: Site) -> Tensor:
        """Return w, with exact zeros in pruned units. Default: θ where kept."""
        return torch.where(site.spread(site.mask), site.theta, 0.0)

    def write(self, sites: Sequence[Site]) -> None:
        """Write w into the parameters, and θ into the latent weights where those are behind."""
        if type(self).materialize is Method.materialize:
            write_kept(sites)
        else:
            write_given(sites, self.materialize)

    def samples(self, step: int, total_steps: int) -> bool:
        """Say whether training passes after `step` compute with random weights; see `write_sample`.

        From a training pass to the step after it, or to the next pass of another kind or the next
        state dict, the parameters hold them; otherwise what `write` wrote.
        """
        return False

    def write_sample(self, sites: Sequence[Site], step: int) -> None:
        """Write the w that the training passes of one step compute with, and set `site.sampled`."""
        raise NotImplementedError

    def to_latent(self, site: Site, weight: Tensor) -> Tensor:
        """Return the θ that gives this w where it is kept."""
        return weight

    def monitor(self, group: Group) -> dict[str, float]:
        """Return numbers worth logging for a group."""
        return {}


def scale_gradients(sites: Sequence[Site], factors: Sequence[Tensor]) -> None:
    """Multiply the gradients by one factor for each unit, in place."""
    if all(site.elementwise for site in sites):
        torch._foreach_mul_([site.required_grad for site in sites], list(factors))
        return
    for site, factor in zip(sites, factors, strict=True):
        grad = site.required_grad
        units.scale(grad, factor, None, grad, site.grid)


def mask_gradients(sites: Sequence[Site], masks: Sequence[Tensor]) -> None:
    """Zero the gradients outside the masks (one boolean per unit), in place."""
    if all(site.elementwise for site in sites):
        kernels.mask_([site.required_grad for site in sites], masks)
        return
    for site, mask in zip(sites, masks, strict=True):
        grad = site.required_grad
        units.scale(grad, mask.to(wide(grad[:0]).dtype), None, grad, site.grid)
