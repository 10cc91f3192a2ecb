"""A run goes on with the options and the data it was begun with, or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from spartan.commands.images import load_data
from spartan.files import load_state, save_state
from tests.commands.calling import call


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert call("train", "--epochs", 1, "--density", 0.1, "--out", folder) == 0
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize(("option", "value"), [("seed", 5), ("weight_decay", 0.1), ("lr", 0.3)])
def test_an_edited_configuration_is_noticed(
    option: str, value: Any, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(run, edited)
    config = json.loads((edited / "config.json").read_text(encoding="utf-8"))
    (edited / "config.json").write_text(json.dumps({**config, option: value}), encoding="utf-8")
    assert call("train", "--resume", edited) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"--{option.replace('_', '-')} was {config[option]!r}" in told
    assert f"cannot become {value!r}" in told


def test_where_it_is_computed_may_change(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    assert call("train", "--resume", moved, "--workers", 1) == 0


def test_other_images_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        for split, count in (("train", 6), ("test", 2)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                level = 20 * i + (90 if name == "b" else 0)
                Image.new("L", (8, 8), level).save(folder / f"{i}.png")
    run = tmp_path / "run"
    begun = ("train", "--data", tmp_path / "data", "--epochs", 1, "--density", 0.5, "--out", run)
    assert call(*begun, "--batch-size", 16) == 0
    train, test = tmp_path / "data" / "train", tmp_path / "data" / "test"

    def told() -> str:
        assert call("train", "--resume", run) == 2
        return " ".join(capsys.readouterr().err.split())

    (train / "a" / "0.png").rename(train / "b" / "9.png")
    assert "have changed since the checkpoint: checksum of training images" in told()
    (train / "b" / "9.png").rename(train / "a" / "0.png")
    one, other = ((test / name / "0.png").read_bytes() for name in ("a", "b"))
    (test / "a" / "0.png").write_bytes(other)
    (test / "b" / "0.png").write_bytes(one)
    assert "have changed since the checkpoint: checksum of test images" in told()
    (test / "a" / "0.png").write_bytes(one)
    (test / "b" / "0.png").write_bytes(other)
    assert call("train", "--resume", run) == 0


def test_a_checkpoint_of_older_versions_goes_on(run: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(run, older)
    state = load_state(older / "checkpoint.safetensors")
    del state["run"]
    save_state(older / "checkpoint.safetensors", state)
    assert call("train", "--resume", older) == 0


def test_groups_of_an_older_optimizer_go_on(run: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(run, older)
    state = load_state(older / "checkpoint.safetensors")
    for group in state["optimizer"]["param_groups"]:
        del group["differentiable"]
    save_state(older / "checkpoint.safetensors", state)
    assert call("train", "--resume", older) == 0


def test_statistics_do_not_depend_on_threads() -> None:
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            data = load_data("digits")
            found.add((data.mean, data.std))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
    ((mean, std),) = found
    pixels = data.train.read(range(len(data.train.labels))).double() / 255
    assert mean == pytest.approx([float(pixels.mean())], rel=1e-12)
    assert std == pytest.approx([float(pixels.std())], rel=1e-12)


@pytest.mark.parametrize("damage", ["step", "tally", "group", "state"])
def test_a_checkpoint_that_does_not_fit_is_refused(
    damage: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    state = load_state(broken / "checkpoint.safetensors")
    if damage == "step":
        state["step"] = 1.5
    elif damage == "tally":
        state["tally"] = torch.zeros(2)
    elif damage == "group":
        state["optimizer"]["param_groups"][0]["lr"] = "fast"
    else:
        state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)
    save_state(broken / "checkpoint.safetensors", state)
    assert call("train", "--resume", broken) == 2
    assert "does not fit" in " ".join(capsys.readouterr().err.split())
