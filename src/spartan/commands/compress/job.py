"""The job of `spartan compress`: open, compress, measure, and write a folder like that of a run."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spartan.commands.accuracy import loss_and_accuracy, pick_device
from spartan.commands.images import ImageData, augment, load_data, normalize
from spartan.commands.models import build_model, pretrained_timm
from spartan.commands.opening import open_model
from spartan.commands.options.compress import CompressConfig
from spartan.commands.runs.facts import read_facts
from spartan.commands.runs.folder import Run
from spartan.deploy.loading import load
from spartan.errors import CalibrationError, ConfigError
from spartan.files import load_tensors, save_tensors, write_text
from spartan.post_training import CompressionReport, compress
from spartan.post_training.network import Tick
from spartan.seeds import derive_seed


@dataclass(frozen=True)
class Job:
    """What is to be compressed, and with what.

    Attributes:
        model: The trained model, in evaluation mode.
        inputs: Calibration inputs.
        images: The images they are of, with the statistics the model was trained with; None where
            they are no images.
        device: Where to compute.
    """

    model: nn.Module
    inputs: Any
    images: ImageData | None
    device: torch.device

    def accuracy(self, model: nn.Module) -> tuple[float, float] | None:
        """Return loss and accuracy on the held-out images, if there are any of these classes."""
        if self.images is None:
            return None
        return loss_and_accuracy(model, self.images.test, self.images, self.device)


def open_job(config: CompressConfig, trust: bool = False) -> Job:
    """Open the model and the calibration inputs.

    Raises:
        ConfigError: The model cannot be made, or its options are missing.
        DataError: There are no images.
        CalibrationError: The inputs are of no known kind.
        FileError: A file is missing or damaged.
        MissingExtraError: A package is needed.
    """
    device = pick_device(config.device)
    if config.source.startswith("transformers:"):
        from spartan.commands.compress.text import open_text_model

        text_model, windows = open_text_model(config)
        return Job(text_model.to(device).eval(), windows, None, device)
    if config.calibration.endswith(".safetensors"):
        tensors, _ = load_tensors(Path(config.calibration))
        model = _open(config, None, trust)
        return Job(model.to(device).eval(), _first(tensors, config.samples), None, device)
    size = config.image_size
    run = Path(config.source)
    if size is None and (run / "config.json").is_file():
        size = read_facts(Run.open(run)).images["size"]
    data = load_data(config.calibration, size)
    model = _open(config, data, trust)
    data = _statistics(config, data, model)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "calibration", 0))
    order = torch.randperm(len(data.train.labels), generator=generator)[: config.samples]
    inputs = normalize(data.train.read(order.tolist()), data)
    return Job(model.to(device).eval(), inputs, data, device)


def run_job(config: CompressConfig, job: Job, tick: Tick) -> tuple[Run, CompressionReport]:
    """Compress, and write the folder: config, metrics, model, to be reported on like a run.

    Nothing is written before everything has been computed.
    """
    report = compress(
        job.model,
        job.inputs,
        density=config.density,
        sparsity=config.sparsity,
        method=config.method,
        allocation=config.allocation,
        reconstruct=None if config.reconstruct == "none" else config.reconstruct,  # type: ignore[arg-type]
        pattern=config.make_pattern(),
        cost=config.cost,
        max_layer_sparsity=config.max_layer_sparsity,
        include=config.include or None,
        exclude=config.exclude or None,
        unreached=config.unreached,  # type: ignore[arg-type]
        distillation=config.make_distillation(_augment(config, job.images)),
        minutes=config.minutes,
        held_out=config.held_out,
        batch_size=config.batch_size,
        seed=config.seed,
        progress=tick,
    )
    rows = _rows(report, job.accuracy(job.model), job.accuracy(report.model))
    run = Run.create(
        dataclasses.replace(
            config,
            model=_name_of(config),
            allocation=report.settings["allocation"],
            reconstruct=str(report.settings["reconstruct"]).lower(),
        )
    )
    write_text(run.metrics_path, "".join(json.dumps(row) + "\n" for row in rows))
    save_tensors(run.model_path, report.model.state_dict(), _facts(report, job.images))
    return run, report


def _open(config: CompressConfig, data: ImageData | None, trust: bool) -> nn.Module:
    source = config.source
    channels, size = (data.channels, data.size) if data else (3, 224)
    classes = len(data.classes) if data else 10
    if source.startswith("timm:"):
        return pretrained_timm(source.removeprefix("timm:"))
    if Path(source).is_file():
        if not config.model:
            raise ConfigError(
                f"{source!r} holds weights only: --model must say what they are of (mlp, resnet20, "
                "vit, timm:NAME or package.module:factory)."
            )
        model = build_model(config.model, channels, size, classes)
        load(source, model)
        return model
    if not (Path(source) / "config.json").is_file():
        raise ConfigError(
            f"{source!r} is not a trained model: give a run folder, a safetensors file with "
            "--model, timm:NAME or transformers:NAME."
        )
    return open_model(source, None, None, classes, trust)[0]


def _name_of(config: CompressConfig) -> str:
    """Return the name that makes the model again."""
    folder = Path(config.source)
    if (folder / "config.json").is_file():
        return Run.open(folder).config().model
    return config.model or config.source


def _statistics(config: CompressConfig, data: ImageData, model: nn.Module) -> ImageData:
    """Return the images with the mean and deviation that the model was trained with."""
    if config.mean:
        if len(config.mean) != data.channels:
            raise ConfigError(f"The images have {data.channels} channels: --mean needs as many.")
        return dataclasses.replace(data, mean=config.mean, std=config.std)
    if (Path(config.source) / "config.json").is_file():
        return read_facts(Run.open(Path(config.source))).normalize_like(data)
    known = getattr(model, "pretrained_cfg", None)
    if isinstance(known, dict) and "mean" in known:
        return dataclasses.replace(data, mean=tuple(known["mean"]), std=tuple(known["std"]))
    return data


def _augment(config: CompressConfig, images: ImageData | None) -> Any:
    if images is None or not (images.flip if config.augment is None else config.augment):
        return None

    def change(batch: Tensor, generator: torch.Generator) -> Tensor:
        return augment(batch, images.flip, generator)

    return change


def _first(tensors: dict[str, Tensor], samples: int) -> Any:
    if not tensors:
        raise CalibrationError("The calibration file holds no tensor.")
    cut = {name: tensor[:samples] for name, tensor in tensors.items()}
    return cut if len(cut) > 1 else next(iter(cut.values()))


def _rows(
    report: CompressionReport,
    before: tuple[float, float] | None,
    after: tuple[float, float] | None,
) -> list[dict[str, Any]]:
    samples = report.samples[0]
    each = report.settings.get("distillation", {}).get("batch_size", samples)
    steps_per_epoch = max(1, samples // each)
    steps = report.settings["steps"]
    rows: list[dict[str, Any]] = []
    for row in report.rows:
        rows.append({"split": "train", "epoch": row["step"] / steps_per_epoch, **row})
    for step, density, measured in ((0, 1.0, before), (steps, report.density, after)):
        if measured is not None:
            loss, accuracy = measured
            rows.append(
                {
                    "split": "test",
                    "step": step,
                    "epoch": step / steps_per_epoch,
                    "loss": loss,
                    "accuracy": accuracy,
                    "density": density,
                }
            )
    return rows


def _facts(report: CompressionReport, images: ImageData | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "step": report.step,
        "total_steps": report.settings["steps"],
        "method": report.settings["method"],
        "pattern": report.settings["pattern"],
        "monitor": {},
        "images": {} if images is None else images.facts(),
        "compression": {
            "settings": report.settings,
            "samples": list(report.samples),
            "phases": report.phases,
            "held_out_loss": report.loss,
            "unreached": report.unreached,
        },
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "units": layer.units,
                "kept_units": layer.kept_units,
                "cost": layer.cost,
                "error": None if layer.error != layer.error else layer.error,
                "seconds": layer.seconds,
            }
            for layer in report.layers
        ],
    }
    return facts
