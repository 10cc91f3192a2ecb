"""Adapters for frozen transformers: the SPARTAN memory, and what it is compared with."""

from spartan.adapters.base import AdapterConfig, AddOn
from spartan.adapters.bottleneck import HoulsbyConfig, PfeifferConfig
from spartan.adapters.layers import Layer, find_layers
from spartan.adapters.lora import LoraConfig
from spartan.adapters.memory import Memory, MemoryConfig
from spartan.adapters.memory_model import MemoryModel, get_adapter_model, get_memory_model
from spartan.adapters.model import AdapterModel
from spartan.adapters.registry import ADAPTERS
from spartan.adapters.tuning import FullConfig, LayerNormConfig, ProbeConfig

__all__ = [
    "ADAPTERS",
    "AdapterConfig",
    "AdapterModel",
    "AddOn",
    "FullConfig",
    "HoulsbyConfig",
    "Layer",
    "LayerNormConfig",
    "LoraConfig",
    "Memory",
    "MemoryConfig",
    "MemoryModel",
    "PfeifferConfig",
    "ProbeConfig",
    "find_layers",
    "get_adapter_model",
    "get_memory_model",
]
