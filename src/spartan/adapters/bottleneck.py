"""Bottleneck adapters: a narrow network beside each sublayer, or after each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spartan.adapters.base import AdapterConfig, AddOn, initialized, require_counts
from spartan.adapters.layers import Layer, width_of

_STD = 0.01  # near the identity, as Houlsby et al. start


class Bottleneck(AddOn):
    """o = up(f(down(h))), added to h."""

    def __init__(self, width: int, size: int, activation: Callable[[Tensor], Tensor]) -> None:
        """Create a network of `size` hidden units for hidden states of `width` entries."""
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        for linear in (self.down, self.up):
            linear.weight = initialized(linear.weight.detach(), _STD)
            nn.init.zeros_(linear.bias)
        self.activation = activation

    def forward(self, output: Tensor, inputs: tuple[Any, ...], module: nn.Module) -> Tensor:
        return output + self.change(output)

    def change(self, h: Tensor) -> Tensor:
        """Return o for hidden states (..., width)."""
        o: Tensor = self.up(self.activation(self.down(h.to(self.down.weight.dtype))))
        return o.to(h.dtype)


class NormalizedBottleneck(Bottleneck):
    """Beside the last norm of a layer: h' = LN(s + o), where s is the sum and o of h = LN(s)."""

    def forward(self, output: Tensor, inputs: tuple[Any, ...], module: nn.Module) -> Tensor:
        normalized: Tensor = module.forward(inputs[0] + self.change(output))
        return normalized


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(AdapterConfig):
    """Settings of bottleneck adapters.

    Attributes:
        size: Hidden units r of each network.
    """

    size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(size=self.size)


@dataclass(frozen=True, kw_only=True)
class HoulsbyConfig(BottleneckConfig):
    """A bottleneck on the outputs of attention and feed-forward network, before the residual sums.

    They stand before the dropout of the sublayer, where the published ones stand behind it.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019.
    """

    name: ClassVar[str] = "houlsby"
    summary: ClassVar[str] = "two bottlenecks in each layer: the classic baseline"
    paper: ClassVar[str] = "Houlsby et al., ICML 2019"
    step_cost: ClassVar[str] = "4 r H products for each position and layer"

    def add_ons(self, layers: Sequence[Layer]) -> Iterator[tuple[str, AddOn]]:
        width = width_of(layers)
        for layer in layers:
            for path in (layer.attention_output, layer.ffn_output):
                yield path, Bottleneck(width, self.size, F.gelu)


@dataclass(frozen=True, kw_only=True)
class PfeifferConfig(BottleneckConfig):
    """A bottleneck after the feed-forward network of each layer.

    Where a norm follows the residual sum s, it gives LN(s + o) with o computed from LN(s); where
    the layer normalizes first, o is computed from the network's output and added to it.

    Source: Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer
    Learning", EACL 2021.
    """

    name: ClassVar[str] = "pfeiffer"
    summary: ClassVar[str] = "one bottleneck in each layer: half of Houlsby's parameters"
    paper: ClassVar[str] = "Pfeiffer et al., EACL 2021"
    step_cost: ClassVar[str] = "2 r H products for each position and layer"

    def add_ons(self, layers: Sequence[Layer]) -> Iterator[tuple[str, AddOn]]:
        width = width_of(layers)
        for layer in layers:
            norm = layer.output_norm
            if norm is None:
                yield layer.ffn_output, Bottleneck(width, self.size, torch.relu)
            else:
                yield norm, NormalizedBottleneck(width, self.size, torch.relu)
