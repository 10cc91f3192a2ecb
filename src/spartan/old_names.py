"""Modules and classes by their names of version 0.1, for old scripts and pickled models."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from spartan.errors import renamed

_MODULES = {
    "always_sparse.dst_ee": "methods.growth.dst_ee",
    "always_sparse.growing": "sparsifier.sparsifier",
    "always_sparse.growth": "methods.growth.contract",
    "always_sparse.gse": "methods.growth.gse",
    "always_sparse.rigl": "methods.growth.rigl",
    "always_sparse.set": "methods.growth.set",
    "always_sparse.static": "methods.growth.static",
    "budget": "budgets.budget",
    "deploy.layers": "deploy.inference_layers",
    "flops": "budgets.flops",
    "freezing": "sparsifier.freezing",
    "kernels.bundles": "kernels.row_bundles",
    "kernels.cutting": "kernels.blocked_weights",
    "masking": "sparsifier.sparsifier",
    "methods.base": "methods.masking.contract",
    "methods.constrained_l0": "methods.masking.constrained_l0",
    "methods.dpf": "methods.masking.dpf",
    "methods.dual_averaging": "methods.masking.dual_averaging",
    "methods.fcpts": "methods.masking.fcpts",
    "methods.fcpts_published": "methods.masking.fcpts_published",
    "methods.fixed": "methods.masking.fixed",
    "methods.gated": "methods.masking.gated",
    "methods.groups": "methods.masking.groups",
    "methods.magnitude": "methods.masking.magnitude",
    "methods.penalised_l0": "methods.masking.penalised_l0",
    "methods.powerpropagation": "methods.masking.powerpropagation",
    "methods.sites": "methods.masking.masked_weight",
    "methods.spartan": "methods.masking.spartan",
    "passes": "sparsifier.pass_hooks",
    "patterns": "weights.patterns",
    "prunable": "weights.prunable",
    "samples": "example_inputs",
    "summary": "sparsifier.layer_summary",
    "training": "commands",
    "training.config": "commands.options.train",
    "training.data": "commands.images",
    "training.models": "commands.models",
    "training.run": "commands.runs.folder",
    "training.trainer": "commands.train.trainer",
    "world_model.environments.gym": "world_model.gym_world",
}
_CLASSES = {
    "Bundles": "RowBundles",
    "Choice": "PendingMask",
    "Contest": "Competition",
    "Group": "BudgetGroup",
    "Growth": "GrowthMethod",
    "GrowingSparsifier": "Sparsifier",
    "MaskingSparsifier": "Sparsifier",
    "Method": "MaskingMethod",
    "Site": "MaskedWeight",
    "SparseConv2d": "InferenceConv2d",
    "SparseLayer": "InferenceLayer",
    "SparseLinear": "InferenceLinear",
    "SparseSite": "GrowingLayer",
    "contests_of": "competitions_of",
    "find_cuts": "find_cutoffs",
}
# What pickled models name: they load without a word, as nobody wrote those names by hand.
_PICKLED = {
    "deploy.layers",
    "kernels.bundles",
    "kernels.cutting",
    "passes",
    "training",
    "training.models",
}


def install() -> None:
    """Let the old module names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "spartan" or name not in _MODULES:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=name == "training")

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.removeprefix("spartan.")
        now = f"spartan.{_MODULES[name]}"
        if name not in _PICKLED:
            renamed(module.__name__, now, stacklevel=3)
        source = importlib.import_module(now)

        def find(attribute: str) -> Any:
            if attribute in _CLASSES and hasattr(source, _CLASSES[attribute]):
                return getattr(source, _CLASSES[attribute])
            return getattr(source, attribute)

        module.__getattr__ = find  # type: ignore[method-assign]
