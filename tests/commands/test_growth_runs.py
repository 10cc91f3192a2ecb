"""`spartan train` with growth methods: run, stop, resume, and what is left in the folder."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spartan.__main__ import main
from spartan.commands.images import load_data
from spartan.commands.options.train import TrainConfig
from spartan.commands.runs.facts import read_facts
from spartan.commands.runs.folder import Run
from spartan.commands.runs.interrupt import InterruptedRunError
from spartan.commands.train.trainer import Trainer
from tests.commands.test_cli import call

METHODS = ["gse", "set", "rigl", "dst-ee", "static"]

pytestmark = pytest.mark.filterwarnings("ignore:.*have no connection")


def config(method: str, out: Path) -> TrainConfig:
    settings = () if method == "static" else ("period=2",)
    return TrainConfig(
        method=method, method_args=settings, density=0.05, epochs=2, seed=1, out=str(out)
    )


def fit(trainer: Trainer, run: Run, stop: int | None = None) -> None:
    def tick(step: int, row: dict[str, Any]) -> None:
        if step == stop:
            signal.raise_signal(signal.SIGINT)

    trainer.fit(run, lambda row: None, tick)


@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_is_the_same_run(method: str, tmp_path: Path) -> None:
    data = load_data("digits", None)
    whole, halved = config(method, tmp_path / "whole"), config(method, tmp_path / "halved")
    fit(Trainer(whole, data), Run.create(whole))
    run = Run.create(halved)
    with pytest.raises(InterruptedRunError):
        fit(Trainer(halved, data), run, stop=7)
    at_stop = read_facts(run)
    assert at_stop.kept <= 4224
    assert [layer.name for layer in at_stop.layers] == ["1.weight", "4.weight", "7.weight"]
    resumed = Trainer(halved, data)
    resumed.load(run)
    assert resumed.step == 7
    fit(resumed, run)
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halved")
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    weights = [first[f"{i}.weight"] for i in (1, 4, 7)]
    assert sum(int(w.count_nonzero()) for w in weights) <= 4224
    rows = [r for r in Run(tmp_path / "whole").metrics() if r["split"] == "train"]
    assert rows == [
        {**row, "images_per_second": r["images_per_second"]}
        for r, row in zip(
            rows,
            [x for x in Run(tmp_path / "halved").metrics() if x["split"] == "train"],
            strict=True,
        )
    ]
    assert all(row["density"] == 0.05 for row in rows)
    assert rows[-1]["tried"] > 0.05 or method == "static"
    assert any(row["churn"] > 0 for row in rows) == (method != "static")


def test_the_commands_take_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    words = ["--method", "gse", "--density", "0.05", "--epochs", "1", "--every-unit"]
    assert call("train", "--dry-run", *words) == 0
    assert "4,224 of 84,480" in capsys.readouterr().out
    assert call("train", "--out", folder, *words) == 0
    assert "5.0000%" in capsys.readouterr().out
    for command in (["evaluate"], ["report"], ["pack"], ["inspect"]):
        target = folder / "model.safetensors" if command == ["inspect"] else folder
        extra = [tmp_path / "packed.safetensors"] if command == ["pack"] else []
        assert call(*command, target, *extra) == 0
    assert "growth has ever tried" in (folder / "report.html").read_text(encoding="utf-8")


def test_train_on_cifar10(cifar10: str, tmp_path: Path) -> None:
    folder = tmp_path / "cifar"
    code = call(
        "train", "--data", f"{cifar10}/test.parquet", "--image-size", 8, "--model", "resnet20",
        "--method", "gse", "--method-args", "period=5", "--density", 0.05, "--epochs", 1,
        "--allocation", "er", "--exclude", "linear", "--out", folder,
    )  # fmt: skip
    assert code == 0
    facts = read_facts(Run(folder))
    assert facts.kept <= round(0.05 * facts.numel)
    assert facts.kept >= 0.99 * round(0.05 * facts.numel)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pattern", "channel"], "single connections"),
        (["--cost", "flops"], "cost='parameters'"),
        (["--count", "all"], "count='prunable'"),
        (["--density", "1e-6"], "keeps nothing"),
        (["--method-args", "sampler=grab"], "did you mean 'grabo'"),
        (["--method", "static", "--method-args", "period=3"], "has no settings"),
    ],
)
def test_bad_input(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = ["--method", "gse", "--density", "0.05", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        main(["train", *defaults, *words])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
