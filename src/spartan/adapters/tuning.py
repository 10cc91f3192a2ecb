"""Baselines without added modules: norm tuning, linear probe and full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from spartan.adapters.base import AdapterConfig, norms, outermost, owners
from spartan.errors import AdapterError


@dataclass(frozen=True, kw_only=True)
class LayerNormConfig(AdapterConfig):
    """Only the norms are trained, and what `modules_to_save` names."""

    name: ClassVar[str] = "layernorm"
    summary: ClassVar[str] = "the norms only: the fewest parameters, often enough"
    paper: ClassVar[str] = "Qi et al., 2022"
    step_cost: ClassVar[str] = "nothing"

    def copied(self, model: nn.Module) -> list[str]:
        found = norms(model)
        if not found:
            raise AdapterError(f"{type(model).__name__} has no norms that could be trained.")
        return outermost([*super().copied(model), *found])


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(AdapterConfig):
    """Only what `modules_to_save` names is trained: a linear probe, if that is a linear head."""

    name: ClassVar[str] = "probe"
    summary: ClassVar[str] = "the head only, on frozen features"
    paper: ClassVar[str] = "Alain and Bengio, 2016"
    step_cost: ClassVar[str] = "nothing"

    def copied(self, model: nn.Module) -> list[str]:
        found = super().copied(model)
        if not found:
            raise AdapterError("A probe has nothing to train: name the head in modules_to_save.")
        return found


@dataclass(frozen=True, kw_only=True)
class FullConfig(AdapterConfig):
    """Everything is trained."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "all weights: what adapters are compared with"
    paper: ClassVar[str] = "-"
    step_cost: ClassVar[str] = "gradients and optimizer state of the whole backbone"

    def copied(self, model: nn.Module) -> list[str]:
        return owners(model)
