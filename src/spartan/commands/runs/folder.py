"""The run folder: where a command keeps what it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from spartan.always_sparse.conversion import dense_state
from spartan.commands.options.compress import CompressConfig
from spartan.commands.options.files import Options, command_of, read_options, to_json
from spartan.commands.options.train import TrainConfig
from spartan.commands.runs.checking import facts_problem, row_problem
from spartan.commands.runs.lock import hold
from spartan.errors import ConfigError, FileError
from spartan.files import load_state, load_tensors, remove_leftovers, write_text


class Run:
    """One run folder.

    Attributes:
        folder: The folder; holds `config.json`, `metrics.jsonl`, `tensorboard/`,
            `checkpoint.safetensors`, `model.safetensors` and `report.html`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_path = folder / "config.json"
        self.metrics_path = folder / "metrics.jsonl"
        self.tensorboard_path = folder / "tensorboard"
        self.checkpoint_path = folder / "checkpoint.safetensors"
        self.model_path = folder / "model.safetensors"
        self.report_path = folder / "report.html"

    @classmethod
    def create(cls, config: Options) -> Run:
        """Start a new run folder.

        Raises:
            ConfigError: The folder already holds a run, or another process works in it.
            FileError: The folder cannot be made.
        """
        run = cls(Path(config.out))
        run.hold_new()
        write_text(run.config_path, to_json(config))
        return run

    def hold(self) -> None:
        """Keep other processes out until this one ends, and remove what a killed one was writing.

        Raises:
            ConfigError: Another process works in the folder.
            FileError: The folder cannot be made.
        """
        hold(self.folder)
        remove_leftovers(self.folder)

    def hold_new(self) -> None:
        """Hold a folder that holds no run yet.

        Raises:
            ConfigError: It does, or another process works in it.
            FileError: The folder cannot be made.
        """
        self.refuse_existing()
        self.hold()
        self.refuse_existing()  # by whoever held it a moment ago

    def refuse_existing(self) -> None:
        """Raise `ConfigError` if the folder already holds a run."""
        if self.config_path.exists():
            folder = str(self.folder)
            raise ConfigError(
                f"{folder!r} already holds a run: continue it with --resume {folder} if it is one "
                "of training, or give another --out."
            )

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Open the folder of a training run or a compression.

        Raises:
            FileError: There is no run.
            ConfigError: Another command wrote the folder.
        """
        run = cls(folder)
        if not run.config_path.is_file():
            raise FileError(f"{str(folder)!r} is not a run folder: it has no config.json.")
        command = command_of(run.config_path)
        if command not in (TrainConfig.command, CompressConfig.command):
            raise ConfigError(
                f"{str(folder)!r} was written by `spartan {command}` and holds no run. Its "
                f"report is {run.report_path}."
            )
        return run

    @classmethod
    def open_to_continue(cls, folder: Path) -> Run:
        """Open the folder of a run to go on with it, alone.

        Raises:
            FileError: There is no run.
            ConfigError: Another command wrote the folder, or another process works in it.
        """
        run = cls.open(folder)
        run.hold()
        return run

    @property
    def name(self) -> str:
        """Last part of the folder's path."""
        return self.folder.resolve().name

    def config(self) -> TrainConfig | CompressConfig:
        """Read the options the run was begun with: of a training run, or of a compression."""
        if command_of(self.config_path) == CompressConfig.command:
            return read_options(CompressConfig, self.config_path)
        return read_options(TrainConfig, self.config_path)

    def metrics(self) -> list[dict[str, Any]]:
        """Read all metrics rows; a last line that is none, as after a crash, is left out.

        Raises:
            FileError: The file cannot be read or is not JSON lines.
        """
        if not self.metrics_path.exists():
            return []
        try:
            lines = self.metrics_path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{str(self.metrics_path)!r} cannot be read: {error}.") from error
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                problem = row_problem(row)
            except (ValueError, RecursionError) as error:
                problem = f"{error}"
            if not problem:
                rows.append(row)
            elif number < len(lines):
                raise FileError(
                    f"{str(self.metrics_path)!r}, line {number}, is no row of metrics: {problem}."
                )
        return rows

    def saved_model(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the weights and facts of the final model, or of the last checkpoint before it.

        Returns:
            The model's state dict, and the facts saved with it: the layers of the budget, image
            statistics, step.

        Raises:
            FileError: Neither file is there, or it is damaged.
        """
        if self.model_path.exists():
            tensors, facts = load_tensors(self.model_path)
            if not isinstance(facts, dict):
                raise FileError(f"{str(self.model_path)!r} was not written by a training run.")
            return tensors, self._checked(facts, self.model_path)
        if not self.checkpoint_path.exists():
            raise FileError(
                f"The run {str(self.folder)!r} has neither a model nor a checkpoint yet."
            )
        state = load_state(self.checkpoint_path)
        model: Any = state.get("model") if isinstance(state, dict) else None
        named = isinstance(model, dict) and all(isinstance(name, str) for name in model)
        if not named or not all(isinstance(x, Tensor) for x in model.values()):
            raise FileError(f"{str(self.checkpoint_path)!r} is not a checkpoint of a run.")
        facts = self._checked(state.get("facts"), self.checkpoint_path)
        shapes = {layer["name"]: layer["shape"] for layer in facts["layers"] if "shape" in layer}
        return dense_state(model, shapes), facts

    @staticmethod
    def _checked(facts: Any, path: Path) -> dict[str, Any]:
        problem = facts_problem(facts)
        if problem:
            raise FileError(f"{str(path)!r} was not written by a run, or is damaged: {problem}.")
        checked: dict[str, Any] = facts
        return checked
