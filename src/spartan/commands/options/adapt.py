"""The options of `spartan adapt`, as the command line and config.json hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import tyro

from spartan.adapters import ADAPTERS, AdapterConfig
from spartan.errors import ConfigError, did_you_mean

# Best of a few on other draws of the texts of benchmarks/memory.py; a probe has a head only.
_RATES = {
    "memory": 0.01,
    "houlsby": 0.003,
    "pfeiffer": 0.003,
    "lora": 0.01,
    "layernorm": 0.01,
    "probe": 0.01,
    "full": 0.0001,
}


@dataclass(frozen=True)
class AdaptConfig:
    """Options of one adaptation, or of several to be compared."""

    command: ClassVar[str | None] = "adapt"

    source: tyro.conf.Positional[str]
    """The pretrained model: a folder that transformers can open, with its tokenizer."""
    data: str
    """docs:PACKAGE (documentation of an installed package, by sub-package), a table (csv, json,
    parquet, …) with text and label columns, or a folder with tables called train and test."""
    task: Literal["classification"] = "classification"
    """What is learned: a class for each text."""
    adapter: tuple[str, ...] = ("memory",)
    """memory, houlsby, pfeiffer, lora, layernorm, probe, full; several are compared."""
    per_class: int | None = None
    """Training texts of each class to draw; all by default."""
    test_per_class: int | None = None
    """Held-out texts of each class to draw; all by default."""
    epochs: int = 5
    """Passes over the training texts."""
    batch_size: int = 16
    """Texts of a batch."""
    lr: float | None = None
    """Learning rate at the start, falling to 0; by default 0.003 of houlsby and pfeiffer, 0.0001 of
    full, else 0.01, which suits a few hundred texts."""
    head_lr: float = 0.01
    """The same of the new head."""
    max_length: int = 128
    """Tokens of a text; the rest is cut off."""
    parents: int = 16
    """Of memory: parents of each layer."""
    children: int = 3
    """Of memory: children of each parent."""
    top_k: int = 8
    """Of memory: parents that each position picks."""
    temperature: float = 1.6
    """Of memory: of the softmax over children."""
    init: Literal["zero_value", "normal"] = "zero_value"
    """Of memory: zero_value starts as the backbone, exactly; normal as published."""
    balance_loss: float = 0.0
    """Of memory: weight of the loss that spreads positions over parents."""
    size: int = 16
    """Of houlsby and pfeiffer: hidden units of each bottleneck."""
    rank: int = 16
    """Of lora: rank of the updates."""
    train_layernorm: bool = False
    """Train all norms too."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers that get add-ons (memory, houlsby, pfeiffer, lora); all by default."""
    seed: int = 0
    """Decides which texts are drawn, their order, and all new weights."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1."""
    out: str = "runs/adapted"
    """Folder to write: a folder for each adapter, results.json and report.html."""

    def __post_init__(self) -> None:
        for name in self.adapter:
            if name not in ADAPTERS:
                raise ConfigError(f"Unknown adapter {name!r}; {did_you_mean(name, ADAPTERS)}")
        if not self.adapter or len(set(self.adapter)) < len(self.adapter):
            raise ConfigError("--adapter needs one name or several different ones.")
        counts = {
            "epochs": self.epochs,
            "batch-size": self.batch_size,
            "max-length": self.max_length,
            "per-class": self.per_class,
            "test-per-class": self.test_per_class,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ConfigError(f"--{name} {count} must be at least 1.")
        if not self.head_lr > 0 or not (self.lr is None or self.lr > 0):
            raise ConfigError(f"--lr {self.lr} and --head-lr {self.head_lr} must be positive.")
        for name in self.adapter:
            self.make_adapter(name, ())  # tells what is out of range

    def make_adapter(self, name: str, head: tuple[str, ...]) -> AdapterConfig:
        """Create the settings of one adapter, with the modules of a new head.

        Raises:
            AdapterError: A setting is out of range.
        """
        common: dict[str, Any] = {
            "target_layers": self.layers or "all",
            "modules_to_save": head,
            "train_layernorm": self.train_layernorm,
        }
        own: dict[str, dict[str, Any]] = {
            "memory": {
                "num_parents": self.parents,
                "children_per_parent": self.children,
                "top_k": self.top_k,
                "temperature": self.temperature,
                "init": self.init,
                "balance_loss": self.balance_loss,
            },
            "houlsby": {"size": self.size},
            "pfeiffer": {"size": self.size},
            "lora": {"rank": self.rank},
        }
        return ADAPTERS[name](**common, **own.get(name, {}))

    def lr_of(self, name: str) -> float:
        """Return the learning rate of one adapter."""
        return _RATES[name] if self.lr is None else self.lr
