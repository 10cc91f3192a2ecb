"""Writes w into the parameters of a model, and detects what other code wrote there since."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from spartan.errors import NonFiniteError, StateError
from spartan.methods.masking.contract import MaskingMethod
from spartan.methods.masking.masked_weight import MaskedWeight


class WeightWriter:
    """Writes the sparse weights into the parameters and remembers having done so.

    Args:
        method: Says how θ becomes w.
        weights: The weights.
    """

    def __init__(self, method: MaskingMethod, weights: Sequence[MaskedWeight]) -> None:
        self._method = method
        # Autograd counts the in-place writes to a tensor: a count other than the one noted after
        # our own write is that of others. Values are compared then: some writes change nothing.
        self._versions = {id(weight): -1 for weight in weights}
        self._warned = False

    @torch.no_grad()
    def write(self, weights: Sequence[MaskedWeight]) -> None:
        """Write w; weights inside a step keep the new θ in their latent weights, and leave it.

        A write that was interrupted may be done again.
        """
        self._method.write(weights)
        self._note(weights)

    @torch.no_grad()
    def write_sample(self, weights: Sequence[MaskedWeight], step: int) -> None:
        """Write the w of a training pass where it is not written yet."""
        behind = [weight for weight in weights if not weight.sampled]
        if behind:
            self._method.write_sample(behind, step)
            self._note(behind)

    def _note(self, weights: Sequence[MaskedWeight]) -> None:
        for weight in weights:
            self._versions[id(weight)] = weight.prunable.parameter._version

    def was_overwritten(self, weight: MaskedWeight) -> bool:
        """Whether the parameter no longer holds the w that was written."""
        parameter = weight.prunable.parameter
        if parameter._version == self._versions[id(weight)]:
            return False
        return not torch.equal(parameter, self._method.materialize(weight))

    @torch.no_grad()
    def adopt(self, weights: Sequence[MaskedWeight], step: int) -> None:
        """Take what was written by others as the new θ, with one warning.

        Raises:
            NonFiniteError: NaN or infinity was written.
            StateError: The parameter has moved to another device or dtype.
        """
        for weight in weights:
            parameter, latent = weight.prunable.parameter, weight.latent
            if parameter.device != latent.device or parameter.dtype != latent.dtype:
                raise StateError(
                    f"{weight.name!r} moved from {latent.device}, {latent.dtype} to "
                    f"{parameter.device}, {parameter.dtype}: move the model before making the "
                    "sparsifier."
                )
            if not self.was_overwritten(weight):
                continue
            if not bool(torch.isfinite(parameter).all()):
                raise NonFiniteError(
                    f"NaN or infinity was written into {weight.name!r} after step {step}."
                )
            changed = parameter != self._method.materialize(weight)
            latent.copy_(torch.where(changed, self._method.to_latent(weight, parameter), latent))
            weight.sampled = False
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{weight.name!r} was written outside the optimizer since step {step}; the "
                    "written values are taken as the new weights. To resume a run, load the "
                    "sparsifier's state after the model's.",
                    stacklevel=2,
                )
