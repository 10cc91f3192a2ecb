"""Facts about a run, read from its folder: what it asked for, and what its tensors hold."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spartan.commands.images import ImageData
from spartan.commands.runs.folder import Run
from spartan.container import count_nonzero
from spartan.errors import FileError


@dataclass(frozen=True)
class LayerFacts:
    """One prunable weight of a saved model.

    Attributes:
        name: Name of the parameter.
        shape: Its shape.
        numel: Number of weights.
        nonzero: Weights that are not zero, counted in the file.
        units: Units of the pattern.
        kept_units: Units its mask keeps.
        cost: Relative cost of one unit.
        error: Relative squared error of its outputs after it was solved; None where it was not.
        seconds: Time that took.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    nonzero: int
    units: int
    kept_units: int
    cost: float
    error: float | None = None
    seconds: float = 0.0

    @property
    def density(self) -> float:
        """Fraction of the weights that are not zero."""
        return self.nonzero / self.numel


@dataclass(frozen=True)
class RunFacts:
    """One run, as its files tell it.

    Attributes:
        name: Name of the run folder.
        config: Its options.
        step: Step of the saved weights.
        total_steps: Steps of the whole run.
        method: Name and settings of the method.
        layers: The prunable weights.
        tensors: The saved state dict.
        images: Channels, size, class names, mean and standard deviation of the images.
        rows: All metrics rows.
        monitor: The method's last numbers.
        compression: What a compression noted: its settings, samples, seconds and held-out loss.
    """

    name: str
    config: dict[str, Any]
    step: int
    total_steps: int
    method: dict[str, Any]
    layers: list[LayerFacts]
    tensors: dict[str, Tensor]
    images: dict[str, Any]
    rows: list[dict[str, Any]]
    monitor: dict[str, float]
    compression: dict[str, Any] | None

    @property
    def kept(self) -> int:
        """Prunable weights that are not zero."""
        return sum(layer.nonzero for layer in self.layers)

    @property
    def numel(self) -> int:
        """All prunable weights."""
        return sum(layer.numel for layer in self.layers)

    @property
    def density(self) -> float:
        """Density of the prunable weights."""
        return self.kept / self.numel

    @property
    def solved(self) -> bool:
        """Whether layers were solved one by one."""
        return any(layer.seconds > 0 for layer in self.layers)

    @property
    def parameters(self) -> tuple[int, int]:
        """Nonzero and all floating-point entries of the file."""
        floats = [t for t in self.tensors.values() if t.is_floating_point()]
        return sum(count_nonzero(t) for t in floats), sum(t.numel() for t in floats)

    @property
    def asked(self) -> str:
        """What was asked for."""
        density, sparsity = self.config["density"], self.config["sparsity"]
        if self.config.get("latency_ms") is not None:
            return f"{self.config['latency_ms']:g} ms, batch {self.config['latency_batch']}"
        if density is None and sparsity is None:
            return "no density"
        return f"density {float(density if density is not None else 1 - sparsity):g}"

    def series(self, split: str, key: str) -> tuple[list[float], list[float]]:
        """Return epochs and values of one metric."""
        rows = [row for row in self.rows if row["split"] == split and {key, "epoch"} <= row.keys()]
        return [row["epoch"] for row in rows], [row[key] for row in rows]

    def last(self, split: str, key: str) -> float:
        """Return the last value of a metric, NaN if there is none."""
        values = self.series(split, key)[1]
        return values[-1] if values else math.nan

    def normalize_like(self, data: ImageData) -> ImageData:
        """Return `data` with the image statistics the model was trained with."""
        mean, std = tuple(self.images["mean"]), tuple(self.images["std"])
        return dataclasses.replace(data, mean=mean, std=std)


def read_facts(run: Run) -> RunFacts:
    """Read a run folder.

    Raises:
        FileError: It has no saved weights yet, or a file is damaged.
    """
    tensors, facts = run.saved_model()
    try:
        layers = [
            LayerFacts(
                name=row["name"],
                shape=tuple(tensors[row["name"]].shape),
                numel=tensors[row["name"]].numel(),
                nonzero=count_nonzero(tensors[row["name"]]),
                units=row["units"],
                kept_units=row["kept_units"],
                cost=row["cost"],
                error=row.get("error"),
                seconds=row.get("seconds", 0.0),
            )
            for row in facts["layers"]
        ]
        return RunFacts(
            name=run.name,
            config=dataclasses.asdict(run.config()),
            step=facts["step"],
            total_steps=facts["total_steps"],
            method=facts["method"],
            layers=layers,
            tensors=tensors,
            images=facts["images"],
            rows=run.metrics(),
            monitor=facts.get("monitor", {}),
            compression=facts.get("compression"),
        )
    except KeyError as error:
        raise FileError(
            f"The files of {str(run.folder)!r} do not fit together: there is no {error}."
        ) from error
