"""SPARTAN: a sparse hierarchical memory after each layer of a frozen transformer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spartan.adapters.base import AdapterConfig, AddOn, require_counts
from spartan.adapters.layers import Layer, width_of
from spartan.adapters.reading import fastest
from spartan.errors import AdapterError
from spartan.kernels.mixing import soft_over_chosen
from spartan.kernels.scores import wide

_STD = 0.02  # of the published initialisation, that of BERT


@dataclass(frozen=True, kw_only=True)
class MemoryConfig(AdapterConfig):
    """Settings of the memory; the sizes are those of the published runs.

    Source: Deshpande, Sultan, Ferritto, Kalyan, Narasimhan, Sil, "SPARTAN: Sparse Hierarchical
    Memory for Parameter-Efficient Transformers", 2022.

    Attributes:
        num_parents: Parents N of each layer.
        children_per_parent: Children C of each parent.
        top_k: Parents k that each position picks.
        temperature: T of the softmax over children.
        init: `"zero_value"`: the model starts as the backbone, exactly. `"normal"`: everything from
            N(0, 0.02²), as published.
        balance_loss: Weight of the loss that spreads positions over parents; 0 for none.
        hidden_size: Width of the layers, where the model does not tell it.
    """

    name: ClassVar[str] = "memory"
    summary: ClassVar[str] = "a small sparse memory after each layer; its parents show topics"
    paper: ClassVar[str] = "Deshpande et al., 2022"
    step_cost: ClassVar[str] = "(N + 2 N C) H products for each position and layer"

    num_parents: int = 16
    children_per_parent: int = 3
    top_k: int = 8
    temperature: float = 1.6
    init: Literal["zero_value", "normal"] = "zero_value"
    balance_loss: float = 0.0
    hidden_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(
            num_parents=self.num_parents,
            children_per_parent=self.children_per_parent,
            top_k=self.top_k,
            hidden_size=1 if self.hidden_size is None else self.hidden_size,
        )
        if self.top_k > self.num_parents:
            raise AdapterError(
                f"top_k={self.top_k} must be from 1 to num_parents={self.num_parents}."
            )
        if not 0 < self.temperature < math.inf:
            raise AdapterError(f"temperature={self.temperature} must be a positive number.")
        if not 0 <= self.balance_loss < math.inf:
            raise AdapterError(f"balance_loss={self.balance_loss} must be a number from 0.")
        if self.init not in ("zero_value", "normal"):
            raise AdapterError(f"init={self.init!r} must be 'zero_value' or 'normal'.")

    def add_ons(self, layers: Sequence[Layer]) -> Iterator[tuple[str, AddOn]]:
        width = width_of(layers) if self.hidden_size is None else self.hidden_size
        for layer in layers:
            yield layer.path, Memory(self, width)


class Memory(AddOn):
    """The memory of one layer, shared by all positions.

    Attributes:
        parents: P, (N, H).
        keys: K, (N, C, H).
        values: V, (N, C, H).
        activity: a of the last forward pass, (batch, positions, N), where the load is balanced in
            training.
    """

    def __init__(self, config: MemoryConfig, width: int) -> None:
        """Create a memory for hidden states of `width` entries."""
        super().__init__()
        n, c = config.num_parents, config.children_per_parent
        self.parents = nn.Parameter(torch.randn(n, width) * _STD)
        self.keys = nn.Parameter(torch.randn(n, c, width) * _STD)
        values = torch.randn(n, c, width) * _STD
        self.values = nn.Parameter(values if config.init == "normal" else torch.zeros_like(values))
        self.chosen = config.top_k
        self.temperature = config.temperature
        self.balanced = config.balance_loss > 0
        self.activity: Tensor | None = None

    def forward(self, output: Tensor, inputs: tuple[Any, ...], module: nn.Module) -> Tensor:
        if output.shape[-1] != self.parents.shape[1]:
            raise AdapterError(
                f"The memory is for hidden states of {self.parents.shape[1]} entries; "
                f"{type(module).__name__} gives {output.shape[-1]}: give hidden_size=, or other "
                "target_layers."
            )
        h = output.to(self.parents.dtype).reshape(-1, output.shape[-1])
        if self.balanced and self.training:
            self.activity = batch_first(self.attend(output), module)
        n, c, _ = self.keys.shape
        read = fastest(n, c, self.chosen, len(h), torch.is_grad_enabled())
        tensors = self.parents, self.keys, self.values
        return read(h, *tensors, self.chosen, self.temperature).view_as(output).to(output)

    def attend(self, h: Tensor) -> Tensor:
        """Return a: how much each position (..., H) reads of each parent, (..., N)."""
        logits = F.linear(h.to(self.parents.dtype), self.parents)
        return soft_over_chosen(wide(logits), self.chosen)

    def __getstate__(self) -> dict[str, Any]:
        # The last activity belongs to a graph, which cannot be copied.
        return {**self.__dict__, "activity": None}


def batch_first(x: Tensor, layer: nn.Module) -> Tensor:
    """Return what belongs to the output of a layer as (batch, positions, ...)."""
    if x.dim() == 2:
        return x.unsqueeze(0)
    attention = getattr(layer, "self_attn", None)
    return x if getattr(attention, "batch_first", True) else x.transpose(0, 1)
