"""All adapters by name."""

from __future__ import annotations

from spartan.adapters.base import AdapterConfig
from spartan.adapters.bottleneck import HoulsbyConfig, PfeifferConfig
from spartan.adapters.lora import LoraConfig
from spartan.adapters.memory import MemoryConfig
from spartan.adapters.tuning import FullConfig, LayerNormConfig, ProbeConfig

ADAPTERS: dict[str, type[AdapterConfig]] = {
    kind.name: kind
    for kind in (
        MemoryConfig,
        HoulsbyConfig,
        PfeifferConfig,
        LoraConfig,
        LayerNormConfig,
        ProbeConfig,
        FullConfig,
    )
}
