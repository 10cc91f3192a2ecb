"""Run folders that somebody damaged or made up: read, or refused in one sentence."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spartan.__main__ import main
from tests.conftest import THOROUGH

JUNK: list[Any] = [
    *(None, True, 0, -1, 1e400, float("nan"), 30_000, 10**30, "", "x", "[/red]", "\x1b[31m"),
    *([], {}, [1], {"a": 1}, [[[]]], "9" * 5000, 1.5),
]
TEXTS = ["", "{", "[" * 100_000, "\x00", "null", "12\n"]


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:  # whatever else comes out is a fault
        main([str(word) for word in words])
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert call("train", "--data", "digits", "--epochs", 1, "--density", 0.1, "--out", folder) == 0
    return folder


def changed(value: Any, draw: random.Random) -> Any:
    """Return a value of JSON of which something, somewhere, is another."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key, chance = draw.choice(list(value)), draw.random()
        if chance < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        i = draw.randrange(len(value))
        return [*value[:i], changed(value[i], draw), *value[i + 1 :]]
    return draw.choice(JUNK)


def change_text(path: Path, draw: random.Random) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".json":
        lines = ["".join(lines)]
    i = draw.randrange(len(lines))
    kept = draw.random() < 0.8
    lines[i] = json.dumps(changed(json.loads(lines[i]), draw)) if kept else draw.choice(TEXTS)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def change_header(path: Path, draw: random.Random) -> None:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    own = json.loads(header["__metadata__"]["spartan"])
    kept = draw.random() < 0.85
    header["__metadata__"]["spartan"] = json.dumps(changed(own, draw)) if kept else TEXTS[2]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


FILES: dict[str, Callable[[Path, random.Random], None]] = {
    "config.json": change_text,
    "metrics.jsonl": change_text,
    "model.safetensors": change_header,
    "checkpoint.safetensors": change_header,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_damaged_folders_are_read_or_refused(name: str, run: Path, tmp_path: Path) -> None:
    draw = random.Random(name)
    for i in range(200 if THOROUGH else 8):
        folder = tmp_path / str(i)
        shutil.copytree(run, folder)
        if name == "checkpoint.safetensors":
            (folder / "model.safetensors").unlink()
        FILES[name](folder / name, draw)
        assert call("report", folder) in (0, 2)
        assert call("evaluate", folder) in (0, 2)
        shutil.rmtree(folder)


def test_a_broken_last_line_of_metrics_stops_nothing(run: Path, tmp_path: Path) -> None:
    for i, end in enumerate(['{"step": 1, "split', "[" * 100_000, "12", '{"step": true}']):
        folder = tmp_path / str(i)
        shutil.copytree(run, folder)
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(end + "\n")
        assert call("train", "--resume", folder) == 0
