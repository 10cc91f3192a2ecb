"""The options of `spartan train`, as the command line and config.json hold them."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any, ClassVar

from spartan import methods
from spartan.budgets.budget import Budget
from spartan.errors import ConfigError, did_you_mean
from spartan.methods.registry import AnyMethod
from spartan.weights.patterns import Pattern, parse_pattern

OPTIMIZERS = ("auto", "sgd", "adamw")
LR_SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class TrainConfig:
    """Options of one training run."""

    command: ClassVar[str | None] = None  # its files say nothing of it

    data: str = "digits"
    """`digits`, a folder of images sorted into class folders, or parquet files (image, label)."""
    model: str = "mlp"
    """mlp, resnet20, vit, timm:NAME, or package.module:factory."""
    method: str = "spartan"
    """spartan, constrained-l0, … as `spartan methods` lists them."""
    method_args: tuple[str, ...] = ()
    """Settings of the method as key=value, e.g. `warmup=0 beta=1,20`."""
    density: float | None = None
    """Fraction of the prunable weights to keep, in (0, 1]."""
    sparsity: float | None = None
    """The same as 1 - density; give one of the two."""
    latency_ms: float | None = None
    """Instead of a density: how long the accelerated model may take on this machine."""
    latency_batch: int = 1
    """Batch size that is to take this long."""
    pattern: str = "unstructured"
    """unstructured, channel, input-channel, block:ROWSxCOLS, or N:M."""
    allocation: str = "global"
    """How the budget spreads over layers: global, uniform, er or erk."""
    cost: str = "parameters"
    """What the budget counts: parameters, flops or bytes."""
    count: str = "prunable"
    """What the density refers to: prunable weights, or all parameters."""
    include: tuple[str, ...] = ()
    """Only these parameters or modules (names or globs) are prunable."""
    exclude: tuple[str, ...] = ()
    """These stay dense."""
    every_unit: bool = False
    """Always-sparse methods: give every output unit at least one connection to begin with."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step."""
    teacher: str | None = None
    """A trained run, or weights of this model, to learn from beside the labels."""
    optimizer: str = "auto"
    """sgd (Nesterov momentum 0.9), adamw, or auto: adamw for transformers, else sgd."""
    lr: float | None = None
    """Peak learning rate; by default 0.1 for sgd, 0.001 for adamw."""
    weight_decay: float | None = None
    """On weights only, not on biases and norms; by default 5e-4 for sgd, 0.05 for adamw."""
    lr_schedule: str = "cosine"
    """cosine or constant, after the warm-up."""
    lr_warmup: float = 0.05
    """Fraction of the run with a linearly growing learning rate."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy, in [0, 1)."""
    clip: float | None = None
    """Largest norm of the gradient; no clipping by default."""
    augment: bool = True
    """Shift images by up to an eighth, and mirror them where the data allow it."""
    image_size: int | None = None
    """Scale images to this size; by default that of the first one."""
    seed: int = 0
    """Decides initial weights, order of images and augmentation."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1."""
    amp: bool = False
    """Mixed precision: float16 with loss scaling on CUDA, bfloat16 elsewhere."""
    compile: bool = False
    """Compile the model with torch.compile."""
    workers: int = 0
    """Processes that decode images, for data too large to keep in memory."""
    checkpoint_every: int = 1
    """Epochs between checkpoints; interruption and the end always write one."""
    out: str = "runs/latest"
    """Run folder to write."""

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(self.latency_batch >= 1, "latency_batch", self.latency_batch, "at least 1")
        _require(self.lr is None or self.lr > 0, "lr", self.lr, "positive")
        decay = self.weight_decay
        _require(decay is None or decay >= 0, "weight_decay", decay, "0 or more")
        _require(0 <= self.lr_warmup < 1, "lr_warmup", self.lr_warmup, "in [0, 1)")
        smoothing = self.label_smoothing
        _require(0 <= smoothing < 1, "label_smoothing", smoothing, "in [0, 1)")
        _require(self.clip is None or self.clip > 0, "clip", self.clip, "positive")
        size = self.image_size
        _require(size is None or size >= 1, "image_size", size, "at least 1")
        _require(self.workers >= 0, "workers", self.workers, "0 or more")
        every = self.checkpoint_every
        _require(every >= 1, "checkpoint_every", every, "at least 1")
        for field, known in (("optimizer", OPTIMIZERS), ("lr_schedule", LR_SCHEDULES)):
            value = getattr(self, field)
            if value not in known:
                raise ConfigError(f"Unknown {field} {value!r}; {did_you_mean(value, known)}")

    def make_method(self) -> AnyMethod:
        """Create the method with its settings."""
        settings = {}
        for text in self.method_args:
            key, equals, value = text.partition("=")
            if not equals:
                raise ConfigError(f"--method-args takes key=value, not {text!r}.")
            settings[key.replace("-", "_")] = _parse_value(value)
        try:
            return methods.create(self.method, **settings)
        except TypeError as error:
            raise ConfigError(f"A setting in --method-args has the wrong type: {error}.") from error

    def make_pattern(self) -> Pattern:
        """Create the pattern."""
        return parse_pattern(self.pattern)

    def make_budget(self, example_input: Any) -> Budget:
        """Create the budget.

        Args:
            example_input: One image, for FLOPs and times.
        """
        settings: dict[str, Any] = {
            "density": self.density,
            "sparsity": self.sparsity,
            "cost": self.cost,
            "allocation": self.allocation,
            "count": self.count,
        }
        if self.latency_ms is not None:
            batch = example_input.expand(self.latency_batch, -1, -1, -1).contiguous()
            return Budget(**settings, latency_ms=self.latency_ms, example_input=batch)
        if self.density is None and self.sparsity is None:
            raise ConfigError(
                "Give --density (fraction kept), --sparsity (fraction removed) or --latency-ms."
            )
        return Budget(**settings, example_input=example_input)


def _require(condition: bool, field: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"--{field.replace('_', '-')} {value} must be {rule}.")


def _parse_value(text: str) -> Any:
    """Read a number, a comma-separated tuple of numbers, or a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
