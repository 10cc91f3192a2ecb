"""`spartan compress` end to end."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spartan.__main__ import main
from spartan.commands.terminal.display import Phases


def spartan(*words: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code == 0


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "run"
    words = ["--data", "digits", "--density", "1", "--epochs", "8", "--out", folder]
    spartan("train", *words)
    return folder


def nonzeros(folder: Path) -> tuple[int, int]:
    weights = [t for k, t in load_file(folder / "model.safetensors").items() if t.dim() > 1]
    return sum(int(t.count_nonzero()) for t in weights), sum(t.numel() for t in weights)


def test_a_run_is_compressed_and_is_a_run_again(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    spartan("compress", dense, "--calibration", "digits", "--density", "0.1", "--steps", "60",
            "--out", out)  # fmt: skip
    printed = capsys.readouterr().out
    kept, total = nonzeros(out)
    assert kept == round(Fraction("0.1") * total)
    assert f"{kept:,}" in printed
    assert "compressed" in printed
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "divergence from the dense network" in page
    rows = [
        json.loads(line)
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    tested = [row for row in rows if row["split"] == "test"]
    assert tested[0]["density"] == 1.0
    assert tested[-1]["accuracy"] > tested[0]["accuracy"] - 0.05
    # What takes a run takes this one.
    spartan("evaluate", out)
    assert f"accuracy {tested[-1]['accuracy']:.2%}" in capsys.readouterr().out.replace("\n", " ")
    spartan("report", out, dense, "--out", tmp_path / "both.html")
    spartan("pack", out, tmp_path / "packed.safetensors")
    packed = tmp_path / "packed.safetensors"
    assert packed.stat().st_size < (out / "model.safetensors").stat().st_size / 3
    assert "is a compression" in refused(capsys, "train", "--resume", out)


@pytest.mark.parametrize("method", ["obs", "sparsegpt", "wanda", "magnitude", "best"])
def test_every_method_has_a_name(dense: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "small"
    spartan("compress", dense, "--calibration", "digits", "--sparsity", "0.7", "--method", method,
            "--samples", "256", "--steps", "20", "--out", out)  # fmt: skip
    kept, total = nonzeros(out)
    assert kept == round(Fraction("0.3") * total)


def test_weights_in_a_file_and_inputs_in_another(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(dense / "model.safetensors")
    save_file(weights, tmp_path / "weights.safetensors")
    words = ["compress", tmp_path / "weights.safetensors", "--density", "0.5", "--method", "obs"]
    spartan(*words, "--model", "mlp", "--calibration", "digits", "--out", tmp_path / "a")
    assert nonzeros(tmp_path / "a")[0] == nonzeros(tmp_path / "a")[1] // 2

    save_file({"x": torch.rand(200, 1, 8, 8)}, tmp_path / "inputs.safetensors")
    words += ["--calibration", tmp_path / "inputs.safetensors", "--out", tmp_path / "b"]
    spartan(*words, "--model", "tests.commands.test_cli_compress:digits_mlp")
    assert nonzeros(tmp_path / "b")[0] == nonzeros(tmp_path / "b")[1] // 2
    assert "accuracy" not in capsys.readouterr().out.rpartition("whole file")[2]
    assert "--model must say" in refused(capsys, *words[:-1], tmp_path / "c")
    assert "not calibrated with images" in refused(capsys, "evaluate", tmp_path / "b")


def digits_mlp() -> torch.nn.Module:
    from spartan.commands.models import mlp

    return mlp(1, 8, 10)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--density", "0.1", "--method", "obd"], "did you mean 'obs'"),
        (["--density", "2"], "must lie in (0, 1]"),
        ([], "Give a density"),
        (["--density", "0.1", "--samples", "1"], "at least 2"),
        (["--density", "0.1", "--calibration", "nowhere"], "No data at 'nowhere'"),
        (["--density", "0.1", "--calibration", "nowhere.safetensors"], "no file"),
        (["--density", "0.1", "--mean", "0.5"], "--mean and --std go together"),
        (["--density", "0.1", "--mean", "0.5", "0.5", "--std", "1", "1"], "1 channels"),
        (["--density", "0.1", "--pattern", "2:4"], "2:4"),
        (["--density", "0.1", "--unreached", "drop"], "unreached="),
        (["--density", "0.1", "--method", "obs", "--samples", "5"], "Give at least"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    start = ["compress", dense, "--calibration", "digits", "--out", tmp_path / "out"]
    error = refused(capsys, *start, *words)
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_and_what_is_there_already(
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rest = ["--calibration", "digits", "--density", "0.1", "--out"]
    assert "not a trained model" in refused(capsys, "compress", "nothing", *rest, tmp_path / "a")
    assert "already holds a run" in refused(capsys, "compress", dense, *rest, dense)
    monkeypatch.setitem(sys.modules, "transformers", None)
    missing = refused(capsys, "compress", "transformers:gpt2", *rest, tmp_path / "a")
    assert "pip install transformers" in missing


@pytest.fixture
def _heard() -> Iterator[None]:
    """A shell in the background lets its children ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heard")
def test_ctrl_c_leaves_nothing_behind(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Phases, phase: str, done: int, total: int) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Phases, "tick", interrupt)
    words = ["--calibration", "digits", "--density", "0.1", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(["compress", str(dense), *words])
    assert stopped.value.code == 128 + signal.SIGINT
    assert not (tmp_path / "out").exists()


def test_best_at_density_one_writes_a_run(tmp_path: Path) -> None:
    spartan("train", "--epochs", "1", "--density", "0.5", "--out", tmp_path / "run")
    given = ("compress", tmp_path / "run", "--calibration", "digits", "--method", "best")
    spartan(*given, "--density", "1", "--out", tmp_path / "same")
    spartan("evaluate", tmp_path / "same")
    spartan("report", tmp_path / "same")


def test_compress_the_pretrained_network(
    cifar10: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Path(cifar10) / "resnet20.safetensors"
    if not weights.exists():
        pytest.skip("the pretrained ResNet-20 is not here")
    spartan(
        *("compress", weights, "--model", "resnet20", "--calibration", cifar10),
        *("--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225"),
        *("--sparsity", "0.7", "--samples", "128", "--method", "sparsegpt"),
        *("--reconstruct", "layer", "--out", tmp_path / "out"),
    )
    kept, total = nonzeros(tmp_path / "out")
    assert kept == round(Fraction("0.3") * total)
    rows = [
        json.loads(x)
        for x in (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert rows[0]["accuracy"] > 0.8
    assert rows[-1]["accuracy"] > 0.72
