"""`MaskedModel`: what of the masked weights the model holds now, counted in its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spartan.budgets.group_budget import GroupBudget
from spartan.kernels.units import pool_magnitudes
from spartan.methods.masking.contract import MaskingMethod
from spartan.methods.masking.groups import BudgetGroup
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.sparsifier.layer_summary import LayerSummary, named, summarize
from spartan.sparsifier.projection import Target, project_onto_masks
from spartan.sparsifier.watch import Watch
from spartan.sparsifier.weight_writer import WeightWriter
from spartan.weights.coverage import coverage_of


class MaskedModel:
    """The model of a masking run: its weights, and what others have done to them.

    Args:
        model: The model.
        method: How masks are found.
        groups: The weights that share a budget.
        weights: All of them, in the order of the model.
        writer: What wrote w into the parameters.

    Attributes:
        coverage: How much of the model is governed.
        watch: Notices parameters that are exchanged or trained otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        method: MaskingMethod,
        groups: Sequence[BudgetGroup],
        weights: Sequence[MaskedWeight],
        writer: WeightWriter,
    ) -> None:
        self.method, self._groups, self._weights = method, groups, weights
        self._writer = writer
        self._last_numbers: dict[str, float] | None = None
        prunables = [weight.prunable for weight in weights]
        self.coverage = coverage_of(model, prunables)
        self.watch = Watch(model, prunables, lambda: [w.name for w in self.overwritten()])

    @property
    def density(self) -> float:
        """Kept fraction of the prunable weights, counted in the parameters.

        Raises:
            StateError: The model has other parameters now.
        """
        rows = self.layers()
        return sum(row.kept for row in rows) / sum(row.numel for row in rows)

    def layers(self) -> list[LayerSummary]:
        """Return what each weight keeps, group by group.

        Counted are the units of the masks; where something else has written into a parameter, those
        in which it is not zero.

        Raises:
            StateError: The model has other parameters now.
        """
        self.watch.require_present()
        return [self._summary(weight) for group in self._groups for weight in group.weights]

    def _summary(self, weight: MaskedWeight) -> LayerSummary:
        kept = weight.kept if self._holds_w(weight) else _units_held(weight)
        return summarize(weight, kept, self.method.is_soft(weight))

    def monitor(self) -> dict[str, float]:
        """Return density, of the masks, and the method's numbers, averaged over groups.

        Those of the method are of the last step, once a run has ended.
        """
        means = self._method_numbers() if self._last_numbers is None else self._last_numbers
        kept = sum(w.kept * w.pattern.unit_numel(w.prunable) for w in self._weights)
        return {"density": kept / sum(w.prunable.numel for w in self._weights), **means}

    def end(self) -> None:
        """Let go of what only training needs; the last numbers of the method stay."""
        self._last_numbers = self._method_numbers()
        for weight in self._weights:
            weight.latent = torch.empty(0)

    def _method_numbers(self) -> dict[str, float]:
        rows = [self.method.monitor(group) for group in self._groups]
        keys = {key for row in rows for key in row}
        return {key: sum(row[key] for row in rows) / len(rows) for key in sorted(keys)}

    def budgets(self) -> list[tuple[str, GroupBudget]]:
        """Return the budget of each group, after the names of its weights."""
        return [(named([w.name for w in group.weights]), group.budget) for group in self._groups]

    def selected(self) -> dict[str, Tensor]:
        """Return the masks."""
        return {weight.name: weight.mask.clone() for weight in self._weights}

    def churn(self, before: Mapping[str, Tensor]) -> float:
        """Return the share of all units whose mask has changed since."""
        changed = sum(int((weight.mask != before[weight.name]).sum()) for weight in self._weights)
        return changed / sum(weight.mask.numel() for weight in self._weights)

    def _holds_w(self, weight: MaskedWeight) -> bool:
        return weight.stepping or self._writer.holds_w(weight)

    def overwritten(self) -> list[MaskedWeight]:
        """Return the weights that others have written, of those that the model still has."""
        gone = set(self.watch.gone())
        return self._writer.overwritten([w for i, w in enumerate(self._weights) if i not in gone])

    def project(self, target: Target) -> Target:
        """Set to zero, in place, what the masks of now prune in a copy of the model."""
        return project_onto_masks(target, self._weights)

    def adopt_masks(self) -> bool:
        """Take the zeros that the model has for the masks, if it is at the budget by them."""
        masks = [_held(weight) for weight in self._weights]
        before = [weight.mask for weight in self._weights]
        for weight, mask in zip(self._weights, masks, strict=True):
            weight.mask = mask
        fits = all(group.kept <= group.budget.kept for group in self._groups)
        for weight, mask in zip(self._weights, before, strict=True):
            if not fits:
                weight.mask = mask
        return fits

    @torch.no_grad()
    def mask_what_is_there(self, weights: Sequence[MaskedWeight]) -> None:
        """Zero what the masks prune in parameters, whoever wrote the rest."""
        for weight in weights:
            weight.parameter.copy_(torch.where(_spread(weight), weight.parameter, 0.0))


@torch.no_grad()
def _held(weight: MaskedWeight) -> Tensor:
    """Return the units in which a parameter is not zero."""
    found: Tensor = weight.parameter
    if not weight.elementwise:
        found = pool_magnitudes(found, weight.grid, weight.stored_mask.shape)
    return found.ne(0)


def _spread(weight: MaskedWeight) -> Tensor:
    return weight.spread(weight.mask)


def _units_held(weight: MaskedWeight) -> int:
    """Count the units in which a parameter is not zero."""
    return int(_held(weight).count_nonzero())
