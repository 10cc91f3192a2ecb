"""Every method of the registry, from training to a resumed run, through the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from spartan.methods import METHODS
from tests.commands.calling import call

# `fixed` keeps masks that it is given, which the command line has no word for.
NAMES = sorted(set(METHODS) - {"fixed"})


@pytest.mark.filterwarnings("ignore")  # a sixth of so small a model leaves units without weights
@pytest.mark.parametrize("name", NAMES)
def test_train_evaluate_report_pack_bench_and_resume(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = ("--data", "digits", "--model", "tests.saved.models:narrow_mlp")
    assert (
        call("train", *data, "--method", name, "--density", 0.3, "--epochs", 1, "--out", run) == 0
    )
    assert call("evaluate", run, "--trust") == 0
    assert call("report", run) == 0
    assert call("pack", run, tmp_path / "packed.safetensors", "--no-zstd") == 0
    words = ("--weights", tmp_path / "packed.safetensors", "--seconds", 0.001, "--trust")
    assert call("bench", run, *words, "--out", tmp_path / "bench") == 0
    before = (run / "model.safetensors").read_bytes()
    assert call("train", "--resume", run, "--trust") == 0
    assert (run / "model.safetensors").read_bytes() == before
