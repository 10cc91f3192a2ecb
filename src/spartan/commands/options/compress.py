"""The options of `spartan compress`, as the command line and config.json hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import tyro

from spartan.errors import ConfigError
from spartan.post_training import Distillation
from spartan.weights.patterns import Pattern, parse_pattern


@dataclass(frozen=True)
class CompressConfig:
    """Options of one compression."""

    command: ClassVar[str | None] = "compress"

    source: tyro.conf.Positional[str]
    """The trained model: a run folder, a safetensors file (with --model), timm:NAME or
    transformers:NAME."""
    calibration: str
    """Unlabelled inputs: digits, a folder of images, parquet files, a safetensors file whose
    tensors are named as forward's arguments, or a text file for transformers."""
    model: str = ""
    """Of a safetensors file: what makes its model, as in `spartan train --model`."""
    density: float | None = None
    """Fraction of the prunable weights to keep, in (0, 1]."""
    sparsity: float | None = None
    """The same as 1 - density; give one of the two."""
    method: str = "fcpts"
    """fcpts, fcpts-published, alps, obs, sparsegpt, wanda, magnitude, or best."""
    allocation: str | None = None
    """How the budget spreads over layers: global, uniform, erk, learned or curves."""
    reconstruct: str = "auto"
    """What follows: none, layer (least squares), network (then distillation), or auto."""
    pattern: str = "unstructured"
    """unstructured, block:ROWSxCOLS, or N:M."""
    cost: str = "parameters"
    """What the budget counts: parameters or flops."""
    max_layer_sparsity: float = 1.0
    """No layer loses a larger fraction than this; every layer keeps a unit."""
    include: tuple[str, ...] = ()
    """Only these parameters or modules (names or globs) are prunable."""
    exclude: tuple[str, ...] = ()
    """These stay dense."""
    unreached: str = "error"
    """Weights that no sample reaches: error, dense, or magnitude."""
    samples: int = 1024
    """Calibration samples to draw."""
    minutes: float | None = None
    """Time the whole may take, instead of --steps."""
    steps: int = 600
    """Steps of the distillation."""
    lr: float | None = None
    """Its learning rate; by default 0.003 with batch norms, 0.0005 without."""
    temperature: float = 4.0
    """Of the logits in its loss."""
    loss: str = "auto"
    """kl on logits, mse on all outputs (regression), or auto."""
    held_out: float = 0.125
    """Fraction of the samples that the distillation is judged by."""
    batch_size: int = 64
    """Samples of a batch."""
    augment: bool | None = None
    """Shift and mirror images in the distillation; by default where they may be mirrored."""
    mean: tuple[float, ...] = ()
    """Mean of the images' channels that the model was trained with; a run knows its own."""
    std: tuple[float, ...] = ()
    """Their standard deviation."""
    image_size: int | None = None
    """Scale images to this size; by default that of the run, or of the first one."""
    tokens: int = 512
    """Tokens of a sample of text."""
    seed: int = 0
    """Decides which samples are drawn, and their order."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1."""
    out: str = "runs/compressed"
    """Folder to write."""

    def __post_init__(self) -> None:
        if self.samples < 2 or self.batch_size < 1 or self.steps < 1 or self.tokens < 1:
            raise ConfigError(
                f"--samples {self.samples} must be at least 2; --batch-size {self.batch_size}, "
                f"--steps {self.steps} and --tokens {self.tokens} at least 1."
            )
        if len(self.mean) != len(self.std):
            raise ConfigError("--mean and --std go together, a number for each channel.")
        if any(value <= 0 for value in self.std):
            raise ConfigError(f"--std {' '.join(map(str, self.std))} must be positive.")

    @property
    def data(self) -> str:
        """Where the images are."""
        return self.calibration

    @property
    def workers(self) -> int:
        """Processes that decode images."""
        return 0

    def make_pattern(self) -> Pattern:
        """Create the pattern."""
        return parse_pattern(self.pattern)

    def make_distillation(self, augment: Any) -> Distillation:
        """Create the settings of the distillation."""
        return Distillation(
            self.steps,
            self.batch_size,
            self.lr,
            self.temperature,
            self.loss,  # type: ignore[arg-type]
            augment,
        )
