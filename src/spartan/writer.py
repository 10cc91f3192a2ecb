"""Parameter ← w, and noticing who else wrote into it since."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from spartan.errors import NonFiniteError, StateError
from spartan.methods.base import Method
from spartan.methods.sites import Site


class WeightWriter:
    """Writes the sparse weights into the parameters and remembers having done so.

    Args:
        method: Says how θ becomes w.
        sites: The weights.
    """

    def __init__(self, method: Method, sites: Sequence[Site]) -> None:
        self._method = method
        # Autograd counts the in-place writes to a tensor; more than ours means somebody else's.
        self._versions = {id(site): -1 for site in sites}
        self._warned = False

    @torch.no_grad()
    def write(self, sites: Sequence[Site]) -> None:
        """Write w; sites inside a step keep the new θ in their latent weights, and leave it.

        A write that was interrupted may be done again.
        """
        self._method.write(sites)
        self._note(sites)

    @torch.no_grad()
    def write_sample(self, sites: Sequence[Site], step: int) -> None:
        """Write the w of a training pass where it is not written yet."""
        behind = [site for site in sites if not site.sampled]
        if behind:
            self._method.write_sample(behind, step)
            self._note(behind)

    def _note(self, sites: Sequence[Site]) -> None:
        for site in sites:
            self._versions[id(site)] = site.weight.parameter._version

    def was_overwritten(self, site: Site) -> bool:
        """Whether the parameter no longer holds the w that was written."""
        parameter = site.weight.parameter
        if parameter._version == self._versions[id(site)]:
            return False
        return not torch.equal(parameter, self._method.materialize(site))

    @torch.no_grad()
    def adopt(self, sites: Sequence[Site], step: int) -> None:
        """Take what was written by others as the new θ, with one warning.

        Raises:
            NonFiniteError: NaN or infinity was written.
            StateError: The parameter has moved to another device or dtype.
        """
        for site in sites:
            parameter, latent = site.weight.parameter, site.latent
            if parameter.device != latent.device or parameter.dtype != latent.dtype:
                raise StateError(
                    f"{site.name!r} moved from {latent.device}, {latent.dtype} to "
                    f"{parameter.device}, {parameter.dtype}: move the model before making the "
                    "sparsifier."
                )
            if not self.was_overwritten(site):
                continue
            if not bool(torch.isfinite(parameter).all()):
                raise NonFiniteError(
                    f"NaN or infinity was written into {site.name!r} after step {step}."
                )
            changed = parameter != self._method.materialize(site)
            latent.copy_(torch.where(changed, self._method.to_latent(site, parameter), latent))
            site.sampled = False
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{site.name!r} was written outside the optimizer since step {step}; the "
                    "written values are taken as the new weights. To resume a run, load the "
                    "sparsifier's state after the model's.",
                    stacklevel=2,
                )
