"""LoRA: low-rank updates of projections."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spartan.adapters.base import AdapterConfig, AddOn, require_counts
from spartan.adapters.layers import Layer
from spartan.errors import AdapterError

# Projections to queries and values, by the last part of their names; those fused with the keys.
_QUERY_VALUE = ("query", "value", "q_lin", "v_lin", "q_proj", "v_proj", "q", "v", "query_proj",
                "value_proj", "c_attn", "in_proj")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoraConfig(AdapterConfig):
    """Low-rank updates W + (α / r) B A of linear projections.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.

    Attributes:
        rank: r.
        alpha: α.
        dropout: Of the updates' input, in training.
        target_modules: Last parts of the names of the projections; by default those of queries and
            values.
    """

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "low-rank updates of projections, which can be merged"
    paper: ClassVar[str] = "Hu et al., ICLR 2022"
    step_cost: ClassVar[str] = "2 r H products for each position and projection"

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: Sequence[str] = _QUERY_VALUE

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(rank=self.rank)
        if not 0 <= self.dropout < 1 or not math.isfinite(self.alpha):
            raise AdapterError(
                f"dropout={self.dropout} must be in [0, 1), alpha={self.alpha} a number."
            )
        if isinstance(self.target_modules, str):
            raise AdapterError(f"target_modules={self.target_modules!r} must be a list of names.")

    def add_ons(self, layers: Sequence[Layer]) -> Iterator[tuple[str, AddOn]]:
        found = False
        for layer in layers:
            for path, module in layer.module.named_modules():
                sizes = _sizes(module) if path.split(".")[-1] in self.target_modules else None
                if sizes is not None:
                    found = True
                    yield f"{layer.path}.{path}", LowRank(self, *sizes)
        if not found:
            raise AdapterError(
                f"No linear projection of {layers[0].path} is called "
                f"{', '.join(self.target_modules)}: give target_modules=. (torch's own attention "
                "has fused projections, which cannot be reached.)"
            )


class LowRank(AddOn):
    """(α / r) B A x, added to W x."""

    mergeable = True

    def __init__(self, config: LoraConfig, inputs: int, outputs: int) -> None:
        """Create an update of a projection from `inputs` to `outputs` entries."""
        super().__init__()
        self.a = nn.Parameter(torch.empty(config.rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, config.rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout

    def forward(self, output: Tensor, inputs: tuple[Any, ...], module: nn.Module) -> Tensor:
        x = F.dropout(inputs[0].to(self.a.dtype), self.dropout, self.training)
        change = F.linear(F.linear(x, self.a), self.b)
        return output + (self.scale * change).to(output.dtype)

    @torch.no_grad()
    def merge(self, module: nn.Module) -> None:
        weight: Any = module.weight
        update = (self.scale * (self.b @ self.a)).to(weight.dtype)
        weight.add_(update if isinstance(module, nn.Linear) else update.t())


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return the inputs and outputs of a linear projection."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":  # of transformers: a transposed linear projection
        inputs, outputs = module.weight.shape  # type: ignore[misc]
        return int(inputs), int(outputs)
    return None
