"""Writes w into the parameters of a model, and detects what other code wrote there since."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from spartan.errors import NonFiniteError, StateError
from spartan.kernels.memory import flat_view, is_dense
from spartan.methods.masking.contract import MaskingMethod
from spartan.methods.masking.masked_weight import MaskedWeight

_SAMPLED = 16  # entries that are compared in every step: as good as free


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
        # Writes through `.data` are not counted; a few entries show nearly all of them.
        self._versions = {id(weight): -1 for weight in weights}
        self._samples: dict[int, Tensor] = {}
        self._warned = False
        self._wary = False  # whether somebody writes through `.data`: then all values are compared

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
            found = sample(weight.parameter)
            if found is not None:
                self._samples[id(weight)] = found.clone()

    def was_overwritten(self, weight: MaskedWeight, exact: bool = True) -> bool:
        """Whether the parameter no longer holds the w that was written.

        Args:
            weight: A weight outside of a step.
            exact: Compare all values. Otherwise only if writes were counted or a few entries
                differ: it takes microseconds and misses what `.data` changed elsewhere.
        """
        parameter = weight.prunable.parameter
        if weight.latent.numel() == 0:  # after finalize: where w is zero is known still
            return bool(weight.parameter.masked_fill(weight.spread(weight.mask), 0.0).any())
        if not (exact or self._wary) and parameter._version == self._versions[id(weight)]:
            found = sample(weight.parameter)
            if found is None or torch.equal(found, self._samples[id(weight)]):
                return False
        return not torch.equal(parameter, self._method.materialize(weight))

    def overwritten(self, weights: Sequence[MaskedWeight]) -> list[MaskedWeight]:
        """Return the weights whose parameters no longer hold the w that was written."""
        return [w for w in weights if not w.stepping and self.was_overwritten(w)]

    @torch.no_grad()
    def adopt(self, weights: Sequence[MaskedWeight], step: int, exact: bool = False) -> None:
        """Take what was written by others as the new θ, with one warning.

        Args:
            weights: The weights, outside of a step.
            step: Steps done.
            exact: Compare all values. So is done anyway after 0, 1, 2, 4, 8, … steps: what a
                training loop does in every step shows at once, and costs nothing in the long run.

        Raises:
            NonFiniteError: NaN or infinity was written.
            StateError: The parameter has moved to another device or dtype, or was resized.
        """
        exact = exact or step & (step - 1) == 0
        for weight in weights:
            parameter, latent = weight.prunable.parameter, weight.latent
            _require_same_kind(weight)
            counted = parameter._version != self._versions[id(weight)]
            if not self.was_overwritten(weight, exact):
                continue
            self._wary |= not counted
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


def sample(parameter: Tensor) -> Tensor | None:
    """Return some entries, spread over the memory, or None where looking would take long."""
    if not (parameter.is_cpu and is_dense(parameter)):
        return None  # a GPU would have to be waited for
    return flat_view(parameter)[:: max(1, parameter.numel() // _SAMPLED)]


def _require_same_kind(weight: MaskedWeight) -> None:
    parameter, latent = weight.prunable.parameter, weight.latent
    if parameter.device != latent.device or parameter.dtype != latent.dtype:
        raise StateError(
            f"{weight.name!r} moved from {latent.device}, {latent.dtype} to "
            f"{parameter.device}, {parameter.dtype}: move the model before making the "
            "sparsifier."
        )
    if parameter.shape != latent.shape:
        raise StateError(
            f"{weight.name!r} was resized from {tuple(latent.shape)} to {tuple(parameter.shape)}: "
            "resize the model before making the sparsifier."
        )
