"""`GrowingModel`: what the always-sparse layers of a growing run hold now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spartan.budgets.group_budget import GroupBudget
from spartan.errors import StateError
from spartan.kernels.key_lists import is_in
from spartan.kernels.memory import sample
from spartan.methods.growth.contract import GrowingLayer, density_of
from spartan.sparsifier.layer_summary import LayerSummary, named
from spartan.sparsifier.projection import Target
from spartan.sparsifier.watch import Watch
from spartan.weights.coverage import coverage_of


class GrowingModel:
    """The model of a growing run.

    Args:
        model: The model.
        layers: Its always-sparse layers.
        budgets: What each, or all together, may keep.

    Attributes:
        coverage: How much of the model is governed.
        watch: Notices layers that are exchanged.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[GrowingLayer], budgets: Sequence[GroupBudget]
    ) -> None:
        self._layers, self._budgets = layers, budgets
        values = [layer.prunable for layer in layers]
        self.coverage = coverage_of(model, values)
        self.watch = Watch(model, values, self.changed)
        self.note()

    def note(self) -> None:
        """Take note of what the layers hold after a step."""
        self._samples = [sample(layer.module.values.detach()) for layer in self._layers]

    def changed(self) -> list[str]:
        """Return the layers into which something else has written since, by a few values."""
        return [
            layer.name
            for layer, before in zip(self._layers, self._samples, strict=True)
            if not torch.equal(sample(layer.module.values.detach()), before)
        ]

    @property
    def density(self) -> float:
        """Connections as a fraction of all pairs.

        Raises:
            StateError: The model has other layers now.
        """
        self.watch.require_present()
        return density_of(self._layers)

    def layers(self) -> list[LayerSummary]:
        """Return what each layer keeps, in the order of the model.

        Raises:
            StateError: The model has other layers now.
        """
        self.watch.require_present()
        return [
            LayerSummary(
                name=layer.name,
                shape=tuple(layer.prunable.shape),
                numel=layer.prunable.numel,
                units=layer.prunable.numel,
                kept_units=layer.connections.count,
                kept=layer.connections.count,
                cost=1.0,
            )
            for layer in self._layers
        ]

    def monitor(self) -> dict[str, float]:
        """Return density, and the share of all pairs that were ever connected."""
        tried = sum(layer.tried.numel() for layer in self._layers)
        return {
            "density": self.density,
            "tried": tried / sum(s.prunable.numel for s in self._layers),
        }

    def budgets(self) -> list[tuple[str, GroupBudget]]:
        """Return what each layer, or all together, may keep."""
        names = [[self._layers[i].name for i in one.members] for one in self._budgets]
        return list(zip(map(named, names), self._budgets, strict=True))

    def selected(self) -> dict[str, Tensor]:
        """Return the keys output * inputs + input of all connections."""
        return {layer.name: layer.connections.keys() for layer in self._layers}

    def churn(self, before: Mapping[str, Tensor]) -> float:
        """Return the share of the connections that are new since."""
        now = self.selected()
        new = sum(int((~is_in(keys, before[name])).sum()) for name, keys in now.items())
        return new / sum(keys.numel() for keys in now.values())

    def project(self, target: Target) -> Target:
        """Raise `StateError`: a copy has its own connections, which no mask of now would fit."""
        raise StateError(
            "Copies of always-sparse layers have connections of their own, with as many values as "
            "the budget says: there is nothing to project. Averages of values of different "
            "connections mean nothing: average when connections no longer move (end=), or average "
            "always_sparse.to_dense(copy.deepcopy(model))."
        )
