"""Every option of `spartan train`, in one dataclass that is also the run folder's config file."""

from __future__ import annotations

import ast
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spartan import methods
from spartan.always_sparse.growth import Growth
from spartan.budget import Budget
from spartan.errors import ConfigError, FileError, did_you_mean
from spartan.methods.base import Method
from spartan.patterns import Pattern, parse_pattern

OPTIMIZERS = ("auto", "sgd", "adamw")
LR_SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class TrainConfig:
    """Options of one training run."""

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

    def make_method(self) -> Method | Growth:
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

    def make_budget(self, sample_input: Any) -> Budget:
        """Create the budget.

        Args:
            sample_input: One image, for FLOPs and times.
        """
        settings: dict[str, Any] = {
            "density": self.density,
            "sparsity": self.sparsity,
            "cost": self.cost,
            "allocation": self.allocation,
            "count": self.count,
        }
        if self.latency_ms is not None:
            batch = sample_input.expand(self.latency_batch, -1, -1, -1).contiguous()
            return Budget(**settings, latency_ms=self.latency_ms, example_input=batch)
        if self.density is None and self.sparsity is None:
            raise ConfigError(
                "Give --density (fraction kept), --sparsity (fraction removed) or --latency-ms."
            )
        return Budget(**settings, sample_input=sample_input)

    def to_json(self) -> str:
        """Return the config file's text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def config_from_json(text: str, source: str) -> TrainConfig:
    """Read a config; options it does not name get their defaults.

    Raises:
        ConfigError: Not JSON, or an option is unknown or out of range.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold one JSON object of options.")
    known = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{source}: unknown option {key!r}; {did_you_mean(key, known)}")
        default = known[key].default
        if default is not None and not isinstance(value, _json_types(default)):
            raise ConfigError(f"{source}: {key} must be {type(default).__name__}, not {value!r}.")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{source}: {key} must be a list of strings, not {value!r}.")
        if default is None and value is not None and not isinstance(value, int | float):
            raise ConfigError(f"{source}: {key} must be a number or null, not {value!r}.")
    lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return TrainConfig(**lists)


def read_config(path: Path) -> TrainConfig:
    """Read the config file of a training run.

    Raises:
        FileError: It cannot be read.
        ConfigError: Its content is wrong.
    """
    return config_from_json(read_options(path), str(path))


def read_options(path: Path) -> str:
    """Read the text of a config file.

    Raises:
        FileError: It cannot be read.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"Cannot read the config {str(path)!r}: {error}.") from error


def _require(condition: bool, field: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"--{field.replace('_', '-')} {value} must be {rule}.")


def _json_types(default: object) -> tuple[type, ...]:
    if isinstance(default, bool):
        return (bool,)
    if isinstance(default, float):
        return (int, float)
    if isinstance(default, tuple):
        return (list,)
    return (type(default),)


def _parse_value(text: str) -> Any:
    """Read a number, a comma-separated tuple of numbers, or a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
