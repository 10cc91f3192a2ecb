"""Run folders that somebody damaged or made up: read, or refused in one sentence."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.calling import call
from tests.fuzz.mutations import change_metadata, change_text, draws


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert call("train", "--data", "digits", "--epochs", 1, "--density", 0.1, "--out", folder) == 0
    return folder


FILES: dict[str, Callable[[Path, random.Random], None]] = {
    "config.json": change_text,
    "metrics.jsonl": change_text,
    "model.safetensors": change_metadata,
    "checkpoint.safetensors": change_metadata,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_damaged_folders_are_read_or_refused(name: str, run: Path, tmp_path: Path) -> None:
    for seed, draw in draws(8):
        folder = tmp_path / seed
        shutil.copytree(run, folder)
        if name == "checkpoint.safetensors":
            (folder / "model.safetensors").unlink()
        FILES[name](folder / name, draw)
        assert call("report", folder) in (0, 2), seed
        assert call("evaluate", folder) in (0, 2), seed
        if name == "checkpoint.safetensors":
            assert call("train", "--resume", folder) in (0, 2), seed
        shutil.rmtree(folder)


def test_a_broken_last_line_of_metrics_stops_nothing(run: Path, tmp_path: Path) -> None:
    for i, end in enumerate(['{"step": 1, "split', "[" * 100_000, "12", '{"step": true}']):
        folder = tmp_path / str(i)
        shutil.copytree(run, folder)
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(end + "\n")
        assert call("train", "--resume", folder) == 0
