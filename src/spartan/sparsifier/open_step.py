"""`OpenStep`: the weights that an optimizer is moving now, and what the model shows meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.sparsifier.model_guard import ModelGuard
from spartan.sparsifier.weight_writer import WeightWriter


class OpenStep:
    """Lets parameters hold θ while an optimizer moves them, and w for whoever uses the model there.

    Args:
        model: The model.
        weights: All its masked weights.
        writer: Writes w.
        runs: Says whether a step is being done now, and has not broken off.

    Attributes:
        inside: The weights that are being stepped; none between steps.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Sequence[MaskedWeight],
        writer: WeightWriter,
        runs: Callable[[], bool],
    ) -> None:
        self._weights, self._writer, self._runs = weights, writer, runs
        self.inside: list[MaskedWeight] = []
        self._guard = ModelGuard(model, self._show_w, self._hide_w)

    def open(self, weights: list[MaskedWeight]) -> None:
        """Begin: let the parameters hold θ."""
        self._guard.open([weight.parameter for weight in weights])
        self.show_theta(weights)

    def show_theta(self, weights: list[MaskedWeight]) -> None:
        """Let the parameters hold θ, for the optimizer to move."""
        self.inside = weights
        for weight in weights:
            weight.prunable.parameter.copy_(weight.latent)
            weight.stepping = True

    def leave(self) -> None:
        """Restore w where a step was begun and did not end, by an exception or a skip."""
        if self.inside:
            inside = self.inside
            self.end()
            self._writer.write(inside)

    def end(self) -> None:
        """Forget the step that is under way, if one is, and what was selected in it."""
        self.inside = []
        for weight in self._weights:
            weight.stepping, weight.pending = False, None
        self._guard.close()

    def _show_w(self) -> None:
        """Let the model hold w for whoever uses it inside of a step; end one that broke off."""
        if not self._runs():
            self.leave()
        elif self.inside:
            self._writer.write(self.inside)

    def _hide_w(self) -> None:
        """Go on with the step."""
        if self.inside and not self.inside[0].stepping:
            self.show_theta(self.inside)
