"""Writes w into the parameters of a model, and detects what other code wrote there since."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from spartan.errors import NonFiniteError, StateError
from spartan.kernels.memory import sample
from spartan.methods.masking.contract import MaskingMethod
from spartan.methods.masking.masked_weight import MaskedWeight

_ROUNDINGS, _PRECISE = 8, (torch.float32, torch.float64)


class WeightWriter:
    """Writes the sparse weights into the parameters and remembers having done so.

    Args:
        method: Says how θ becomes w.
        weights: The weights.
    """

    def __init__(self, method: MaskingMethod, weights: Sequence[MaskedWeight]) -> None:
        self.method = method
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
        self.method.write(weights)
        self._note(weights)

    @torch.no_grad()
    def write_sample(self, weights: Sequence[MaskedWeight], step: int) -> None:
        """Write the w of a training pass where it is not written yet."""
        behind = [weight for weight in weights if not weight.sampled]
        if behind:
            self.method.write_sample(behind, step)
            self._note(behind)

    def _note(self, weights: Sequence[MaskedWeight]) -> None:
        for weight in weights:
            self._versions[id(weight)] = weight.prunable.parameter._version
            if weight.parameter.is_cpu:  # a GPU would have to be waited for
                self._samples[id(weight)] = sample(weight.parameter)

    def changes(self, weight: MaskedWeight, exact: bool = True) -> Tensor | None:
        """Return which entries others have changed since w was written, or None if none.

        In float32 and float64 a few roundings of θ are no change: some optimizers write weights
        away and back, and kernels for other memory orders may round otherwise.

        Args:
            weight: A weight outside of a step.
            exact: Compare all values. Otherwise only if writes were counted or a few entries
                differ: it takes microseconds and misses what `.data` changed elsewhere.
        """
        parameter = weight.parameter
        if weight.latent.numel() == 0:  # after finalize: where w is zero is known still
            filled = (parameter != 0) & ~weight.spread(weight.mask)
            return filled if bool(filled.any()) else None
        if not (exact or self._wary) and not self._counted(weight):
            before = self._samples.get(id(weight))
            if before is None or torch.equal(sample(parameter), before):
                return None
        w = self.method.materialize(weight)
        if torch.equal(parameter, w):
            return None
        rounding = _ROUNDINGS * torch.finfo(w.dtype).eps if w.dtype in _PRECISE else 0.0
        changed = ~((parameter - w).abs() <= rounding * weight.latent.abs())  # also NaN
        return changed if bool(changed.any()) else None

    def _counted(self, weight: MaskedWeight) -> bool:
        """Whether autograd has counted a write since ours."""
        return weight.prunable.parameter._version != self._versions[id(weight)]

    def holds_w(self, weight: MaskedWeight) -> bool:
        """Whether a parameter outside of a step holds w, to the bit."""
        if weight.latent.numel() == 0:
            return self.changes(weight) is None
        return torch.equal(weight.parameter, self.method.materialize(weight))

    def overwritten(self, weights: Sequence[MaskedWeight]) -> list[MaskedWeight]:
        """Return the weights whose parameters no longer hold the w that was written."""
        return [w for w in weights if not w.stepping and self.changes(w) is not None]

    @torch.no_grad()
    def adopted(self, weight: MaskedWeight, exact: bool = False) -> Tensor:
        """Return the θ that `adopt` would leave, and change nothing.

        Raises:
            StateError: The parameter has moved to another device or dtype, or was resized.
        """
        _require_same_kind(weight)
        changed = self.changes(weight, exact)
        return weight.latent.clone() if changed is None else self._with(changed, weight)

    def _with(self, changed: Tensor, weight: MaskedWeight) -> Tensor:
        """Return θ with what others have written in its place."""
        found = self.method.to_latent(weight, weight.parameter)
        return torch.where(changed, found, weight.latent)

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
            parameter, latent = weight.parameter, weight.latent
            _require_same_kind(weight)
            changed = self.changes(weight, exact)
            if changed is None:
                continue
            self._wary |= not self._counted(weight)
            if not bool(torch.isfinite(parameter).all()):
                raise NonFiniteError(
                    f"NaN or infinity was written into {weight.name!r} after step {step}."
                )
            latent.copy_(self._with(changed, weight))
            weight.sampled = False
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{weight.name!r} was written outside the optimizer since step {step}; the "
                    "written values are taken as the new weights. To resume a run, load the "
                    "sparsifier's state after the model's.",
                    stacklevel=2,
                )


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
