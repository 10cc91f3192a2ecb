"""The commands end to end, each in a fresh process where that is what is promised."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from spartan.commands.runs.folder import Run
from spartan.commands.runs.metrics import Row
from spartan.commands.terminal.display import Display
from spartan.deploy.packing import save
from tests.commands.calling import call
from tests.conftest import ROOT

TINY = ["--epochs", "3", "--density", "0.1", "--seed", "1"]


def spartan(*words: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "spartan", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **(env or {})},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert call("train", "--out", folder, *TINY) == 0
    return folder


def test_train_says_what_was_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--out", tmp_path / "run", *TINY) == 0
    shown = capsys.readouterr()
    assert "test accuracy" in shown.out
    assert "Traceback" not in shown.err


def test_train_fills_the_run_folder(run: Path) -> None:
    names = {p.name for p in run.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "tensorboard", "checkpoint.safetensors",
        "model.safetensors", "report.html",
    }  # fmt: skip
    tensors = load_file(run / "model.safetensors")
    weights = [t for k, t in tensors.items() if t.dim() == 2]
    kept = sum(int(t.count_nonzero()) for t in weights)
    assert kept == round(0.1 * sum(t.numel() for t in weights))
    rows = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    tests = [row for row in rows if row["split"] == "test"]
    assert [row["epoch"] for row in tests] == [1, 2, 3]
    assert tests[-1]["density"] == pytest.approx(0.1, abs=1e-4)
    train_rows = [row for row in rows if row["split"] == "train"]
    assert {"loss", "accuracy", "density", "beta", "churn", "lr"} <= set(train_rows[0])
    assert sum(row["churn"] > 0 for row in train_rows) > 1
    assert any((run / "tensorboard").iterdir())


def test_evaluate_agrees_with_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("evaluate", run) == 0
    accuracy = re.search(r"accuracy ([\d.]+)%", capsys.readouterr().out)
    assert accuracy is not None
    last = [r for r in Run.open(run).metrics() if r["split"] == "test"][-1]
    assert float(accuracy[1]) == pytest.approx(100 * last["accuracy"], abs=0.006)


def test_a_signal_ends_a_process_with_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    process = spartan("train", "--out", folder, *TINY, "--epochs", "100000")
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and len(metrics.read_text(encoding="utf-8").splitlines()) > 7:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        code, _, err = finish(process)
    finally:
        process.kill()
    assert code == 128 + signal.SIGINT, err
    assert f"spartan train --resume {folder}" in err
    assert "Traceback" not in err
    assert not (folder / "model.safetensors").exists()


def test_interrupted_and_resumed_is_the_same_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "broken"
    tick = Display.tick

    def interrupt(self: Display, step: int, row: Row) -> None:
        tick(self, step, row)
        if step == 20:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "tick", interrupt)
        assert call("train", "--out", folder, *TINY) == 128 + signal.SIGTERM
    assert not (folder / "model.safetensors").exists()
    assert call("evaluate", folder) == 0
    capsys.readouterr()
    assert_resumes_to(run, folder)
    assert "resuming" in capsys.readouterr().out


def assert_resumes_to(whole: Path, broken: Path) -> None:
    assert call("train", "--resume", broken) == 0
    wanted, again = (load_file(f / "model.safetensors") for f in (whole, broken))
    assert all(torch.equal(tensor, again[name]) for name, tensor in wanted.items())

    def losses(path: Path) -> list[tuple[int, float]]:
        return [(row["step"], row["loss"]) for row in Run.open(path).metrics()]

    assert losses(broken) == losses(whole)


def test_config_file_repeats_a_run(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    assert call("train", "--config", run / "config.json", "--out", folder) == 0
    first, second = (load_file(f / "model.safetensors") for f in (run, folder))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_report_of_one_and_of_several(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 6
    assert not re.search(r'(src|href)="(?!#)', page)  # nothing is loaded from elsewhere
    assert "&lt;svg" not in page
    other = tmp_path / "magnitude"
    assert call("train", "--method", "magnitude", "--out", other, *TINY) == 0
    capsys.readouterr()
    both = tmp_path / "both.html"
    assert call("report", run, other, "--out", both) == 0
    out = capsys.readouterr().out
    assert "whole" in out
    assert "8,448" in out  # kept weights of the mlp
    text = both.read_text(encoding="utf-8")
    assert "whole" in text
    assert "magnitude" in text
    assert text.count("<svg") == 7


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "dry"
    code = call("train", "--dry-run", "--out", folder, "--cost", "flops", "--model", "resnet20",
                "--pattern", "channel", *TINY)  # fmt: skip
    assert code == 0
    out = capsys.readouterr().out
    assert "budget" in out
    assert "layer3.2.conv2.weight" in out
    assert "at least" in out
    assert not folder.exists()


def test_inspect(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", run / "model.safetensors") == 0
    assert "1.weight" in capsys.readouterr().out
    torch.save({"model": {"w": torch.eye(10)}, "list": [torch.zeros(3)]}, tmp_path / "a.pt")
    assert call("inspect", tmp_path / "a.pt") == 0
    torch.save({"f8": torch.eye(4).to(torch.float8_e4m3fn)}, tmp_path / "f8.pt")
    assert call("inspect", tmp_path / "f8.pt") == 0
    out = capsys.readouterr().out
    assert "model.w" in out
    assert "10.00%" in out
    assert "list.0" in out


NAMES = ["[/red]", "model[final]", "[bold]x", ":smile:", "$a_b$", "_hidden", "a\x1b[31mb", "\x9b2J"]


def test_names_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "[red] model[final].safetensors"
    save({name: torch.ones(2) for name in NAMES}, file)
    assert call("inspect", file) == 0
    assert call("pack", file, tmp_path / "[x].safetensors", "--no-zstd") == 0
    out = capsys.readouterr().out
    assert not {"\x1b", "\x9b"} & set(out)
    for name in NAMES:
        shown = name.replace("\x1b", "\\x1b").replace("\x9b", "\\x9b")
        assert out.count(shown) >= 2
    assert call("inspect", tmp_path / "\x1b[31m[gone]") == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "[gone]" in err


def test_a_run_folder_may_have_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs [b] $x_y$"
    data = ("--data", "digits", "--model", "mlp", "--epochs", 1, "--density", 0.5)
    assert call("train", *data, "--out", run) == 0
    assert call("report", run) == 0
    assert call("bench", run, "--seconds", 0.001, "--out", run / "bench [x]") == 0
    assert "[b]" in "".join(capsys.readouterr().out.split())


def test_inspect_counts_tied_tensors_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.Linear(20, 20))
    model[1].weight = model[0].weight
    save(model, tmp_path / "tied.safetensors")
    torch.save(model.state_dict(), tmp_path / "tied.pt")
    for name in ("tied.safetensors", "tied.pt"):
        assert call("inspect", tmp_path / name) == 0
        out = capsys.readouterr().out
        assert "is 0.weight" in out
        assert "440" in out
        assert "840" not in out


def test_train_on_cifar10(cifar10: str, tmp_path: Path) -> None:
    # The command on real images; a tenth of the test file keeps it short.
    folder = tmp_path / "cifar"
    code, _, err = finish(
        spartan("train", "--data", f"{cifar10}/test.parquet", "--image-size", 8, "--model",
                "resnet20", "--pattern", "2:4", "--exclude", "conv1", "--density", 0.5,
                "--epochs", 1, "--out", folder)
    )  # fmt: skip
    assert code == 0, err
    weight = load_file(folder / "model.safetensors")["layer1.0.conv1.weight"]
    assert bool(((weight != 0).unflatten(1, (-1, 4)).sum(2) == 2).all())


BAD: list[tuple[list[str], str]] = [
    (["--density", "1.5"], "must lie in"),
    (["--density", "0"], "must lie in"),
    (["--density", "0.1", "--sparsity", "0.9"], "not both"),
    ([], "Give --density"),
    (["--density", "1e-9"], "smallest reachable"),
    (["--density", "0.1", "--method", "spartn"], "did you mean 'spartan'"),
    (["--density", "0.1", "--model", "resnet2"], "did you mean 'resnet20'"),
    (["--density", "0.1", "--pattern", "blok:2x2"], "Unknown pattern"),
    (["--density", "0.1", "--pattern", "block:7x7"], "do not divide"),
    (["--density", "0.1", "--allocation", "erkk"], "did you mean 'erk'"),
    (["--density", "0.1", "--data", "nowhere"], "No data at"),
    (["--density", "0.1", "--include", "layer9"], "No parameter is named"),
    (["--density", "0.1", "--exclude", "*"], "Nothing to prune"),
    (["--density", "0.1", "--device", "tpu"], "not available"),
    (["--density", "0.1", "--method", "fixed"], "prune the model first"),
    (["--density", "0.1", "--model", "torch.nn:Identity"], "logits of shape (2, 10)"),
    (["--density", "0.1", "--model", "tests.conftest:Net"], "fails on images of (1, 8, 8)"),
    (["--density", "0.1", "--lr", "1e30"], "NaN or infinite"),
    (["--resume", "nowhere"], "not a run folder"),
    (["--config", "nowhere.json"], "Cannot read the config"),
    (["--density", "0.1", "--method-args", "bta=3"], "no setting 'bta'"),
    (["--density", "0.1", "--teacher", "nowhere.safetensors"], "nowhere.safetensors"),
    (["--density", "0.1", "--teacher", "tests"], "not a run folder"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(w) or "none" for w, _ in BAD])
def test_bad_input_is_one_sentence_and_exit_code_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--resume" in words else ["--out", tmp_path / "run"]
    assert call("train", *out, "--epochs", 2, *words) == 2
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in err


@pytest.mark.parametrize("batch_size", [7, 73])
def test_the_last_accuracy_is_that_of_the_saved_model(
    batch_size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where masks move to the very end, and with batches that leave one image over."""
    words = ["--density", "0.05", "--epochs", "2", "--method-args", "finetune=0"]
    folder = tmp_path / "run"
    assert call("train", "--out", folder, *words, "--batch-size", batch_size) == 0
    told = re.findall(r"test accuracy ([\d.]+)%", capsys.readouterr().out)[-1]
    assert call("evaluate", folder) == 0
    assert f"{told}%" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_a_run_learns_from_another(
    file: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher is a run, or its weights; the run is resumed with the same one."""
    taught = tmp_path / "taught"
    words = ["--out", taught, "--epochs", "2", "--density", "0.05", "--teacher", run / file]
    assert call("train", *words) == 0
    config = json.loads((taught / "config.json").read_text(encoding="utf-8"))
    assert config["teacher"] == str(run / file)
    assert call("train", "--resume", taught, "--teacher", "other") == 2
    assert "--teacher was" in capsys.readouterr().err
    alone = tmp_path / "alone"
    assert call("train", *["--out", alone, "--epochs", "2", "--density", "0.05"]) == 0
    weights = [load_file(folder / "model.safetensors")["7.weight"] for folder in (taught, alone)]
    assert not torch.equal(*weights)


def test_a_teacher_of_other_images_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = tmp_path / "images"
    for split in ("train", "test"):
        for name in ("a", "b"):
            (folders / split / name).mkdir(parents=True)
            for number in range(4):
                image = Image.new("L", (8, 8), 60 * number + 9 * (name == "b"))
                image.save(folders / split / name / f"{number}.png")
    words = ["--out", tmp_path / "run", "--density", "0.1", "--data", folders, "--teacher", run]
    assert call("train", *words) == 2
    assert "must have learned the same task" in capsys.readouterr().err


def test_run_folders_are_not_overwritten_or_changed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "model.safetensors").read_bytes()
    assert call("train", "--out", run, *TINY) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert call("train", "--resume", run, "--density", "0.2") == 2
    assert "--density was 0.1" in capsys.readouterr().err
    assert call("train", "--resume", run, "--config", run / "config.json") == 2
    assert (run / "model.safetensors").read_bytes() == before


def test_damaged_runs_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((run / "config.json").read_bytes())
    assert call("evaluate", broken) == 2
    assert "neither a model nor a checkpoint" in capsys.readouterr().err
    checkpoint = (run / "checkpoint.safetensors").read_bytes()
    (broken / "checkpoint.safetensors").write_bytes(checkpoint[: len(checkpoint) // 2])
    assert call("train", "--resume", broken) == 2
    assert "damaged" in capsys.readouterr().err
    save_file({"w": torch.ones(2)}, broken / "model.safetensors")
    for command in ("evaluate", "report"):
        assert call(command, broken) == 2
        assert "not written by a training run" in capsys.readouterr().err
    (broken / "x.pt").write_bytes(b"garbage")
    assert call("inspect", broken / "x.pt") == 2
    assert "neither a safetensors file" in capsys.readouterr().err
    assert call("inspect", broken / "none.pt") == 2


def test_unknown_options_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--densty", "0.1") == 2
    assert "--density" in capsys.readouterr().err
    assert call("trian") == 2
    assert "train, evaluate" in capsys.readouterr().err
    assert call("--help") == 0
    assert "inspect" in capsys.readouterr().out


def test_pack_unpack_and_evaluate(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, back = tmp_path / "packed.safetensors", tmp_path / "back.safetensors"
    assert call("pack", run, packed) == 0
    printed = capsys.readouterr().out
    assert "gaps" in printed
    assert "zstd -12" in printed
    assert packed.stat().st_size < 0.3 * (run / "model.safetensors").stat().st_size
    assert call("unpack", packed, back) == 0
    original, unpacked = load_file(run / "model.safetensors"), load_file(back)
    assert original.keys() == unpacked.keys()
    assert all(torch.equal(original[name], unpacked[name]) for name in original)
    assert call("inspect", packed) == 0
    assert call("evaluate", run) == 0
    wanted = capsys.readouterr().out.rpartition("accuracy ")[2].split()[0]
    assert call("evaluate", run, "--weights", packed, "--accelerated") == 0
    assert f"accuracy {wanted}" in capsys.readouterr().out


def test_evaluate_counts_in_the_weights_it_is_given(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(run / "model.safetensors")
    state["1.weight"] = torch.zeros_like(state["1.weight"])
    save_file(state, tmp_path / "other.safetensors")
    assert call("evaluate", run, "--weights", tmp_path / "other.safetensors") == 0
    kept = sum(int(state[f"{i}.weight"].count_nonzero()) for i in (4, 7))
    assert f"({kept:,} of 84,480" in capsys.readouterr().out


def test_bench_writes_table_figures_and_plot(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench"
    words = ["--batch", "1", "16", "--threads", "1", "--seconds", "0.01", "--out", out]
    threads = torch.get_num_threads()
    assert call("bench", run, *words) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert printed.count("whole model: dense") == 2
    plans = json.loads((out / "bench.json").read_text(encoding="utf-8"))
    assert {layer["name"] for layer in plans["16"]["layers"]} == {"1", "4", "7"}
    assert "256x256" in (out / "bench.txt").read_text(encoding="utf-8")
    assert (out / "bench.svg").read_text(encoding="utf-8").startswith("<?xml")
    assert call("bench", "mlp", "--input", "1x1x8x8", *words) == 0


def test_bench_and_export_take_several_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--batch", "2", "3", "--seconds", "0.01", "--out", tmp_path]
    inputs = ["--input", "ids=1x6:int64", "mask=1x6:bool"]
    assert call("bench", "tests.deploy.models:reader", *inputs, *words) == 0
    printed = capsys.readouterr().out
    assert "batch 3" in printed
    assert "a table" in printed
    factory = ["--input", "tests.deploy.models:text"]
    assert call("bench", "tests.deploy.models:reader", *factory, "--out", tmp_path) == 0
    assert call("bench", "tests.deploy.models:reader", *factory, "--batch", 9) == 2
    assert "how large the batch is" in capsys.readouterr().err
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    onnx = ["--onnx", tmp_path / "x.onnx"]
    assert call("export", "tests.deploy.models:reader", *inputs, *onnx) == 0
    assert "dimensions ids [1], mask [1]" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["evaluate", "bench", "export", "compress", "train", "teacher"])
def test_a_folder_runs_no_function_of_its_own_unless_trusted(
    command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "foreign"
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model"] = "os:abort"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words: dict[str, tuple[object, ...]] = {
        "evaluate": ("evaluate", folder),
        "bench": ("bench", folder),
        "export": ("export", folder, "--onnx", tmp_path / "x.onnx"),
        "compress": ("compress", folder, "--density", 0.5, "--calibration", "digits"),
        "train": ("train", "--resume", folder),
        "teacher": ("train", "--density", 0.5, "--teacher", folder, "--out", tmp_path / "x"),
    }
    assert call(*words[command]) == 2
    assert "--trust" in capsys.readouterr().err
    assert call("report", folder) == 0  # makes no model


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor") == 0
    printed = capsys.readouterr().out
    for subject in ("processor", "kernels", "threads", "torch", "GPU"):
        assert subject in printed


def test_doctor_names_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("COLUMNS", "200")
    assert call("doctor") == 0
    assert "spartan-torch[onnx]" in capsys.readouterr().out


def test_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    assert call("export", run, "--onnx", tmp_path / "model.onnx") == 0
    assert "ONNX Runtime agrees" in capsys.readouterr().out
    assert (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("pack", "missing.safetensors", "out"), "no file"),
        (("pack", "{run}", "{run}/model.safetensors"), "another"),
        (("pack", "{run}", "{run}"), "folder"),
        (("unpack", "{run}/config.json", "out"), "no safetensors file"),
        (("bench", "mlp"), "--input"),
        (("bench", "mlp", "--input", "axb"), "no input"),
        (("bench", "mlp", "--input", "1x1x8x8:int5"), "no dtype"),
        (("bench", "mlp", "--input", "x=1x1x8x8", "1x3"), "a name"),
        (("bench", "mlp", "--input", "nowhere:function"), "nowhere"),
        (("bench", "nosuch", "--input", "1x1x8x8"), "nosuch"),
        (("bench", "{run}", "--input", "1x5x8x8"), "does not run"),
        (("bench", "{run}", "--threads", "0"), "thread"),
        (("bench", "{run}", "--batch", "0"), "positive"),
        (("bench", "{run}", "--weights", "missing"), "no file"),
        (("evaluate", "{run}", "--weights", "{run}/config.json"), "no safetensors file"),
        (("export", "mlp", "--onnx", "x.onnx"), "--input"),
        (("train", "--latency-ms", "1000", "--out", "x"), "already takes"),
        (("train", "--latency-ms", "1", "--density", "0.1", "--out", "x"), "of its own"),
        (("train", "--out", "x"), "--latency-ms"),
    ],
)
def test_deploy_commands_name_what_is_wrong(
    words: tuple[str, ...], reason: str, run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = (run / "model.safetensors").read_bytes()
    assert call(*(word.replace("{run}", str(run)) for word in words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert reason in error
    assert not list(tmp_path.iterdir())
    assert (run / "model.safetensors").read_bytes() == before


def test_names_in_figures_are_no_formulas(tmp_path: Path) -> None:
    run = tmp_path / "_$x_y$"
    data = ("--data", "digits", "--model", "mlp", "--epochs", 1, "--density", 0.5)
    assert call("train", *data, "--out", run) == 0
    assert call("train", *data, "--out", tmp_path / "b$") == 0
    assert call("report", run, tmp_path / "b$", "--out", tmp_path / "both.html") == 0
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", page)
    assert "\u200b_$x_y$" in labels
    assert "b$" in labels


def test_verify_says_what_it_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save({"w": torch.ones(4), "v": torch.zeros(9)}, tmp_path / "own.safetensors")
    save_file({"w": torch.ones(4)}, tmp_path / "of_others.safetensors")
    assert call("inspect", tmp_path / "own.safetensors", "--verify") == 0
    assert "all 2 arrays are as they were written" in capsys.readouterr().out
    assert call("inspect", tmp_path / "of_others.safetensors") == 0
    assert call("inspect", tmp_path / "of_others.safetensors", "--verify") == 2
    assert "has no checksums" in " ".join(capsys.readouterr().err.split())


def test_inspect_and_report_count_every_dtype(tmp_path: Path) -> None:
    odd = {f"{d}": torch.ones(3).to(d) for d in (torch.uint16, torch.uint32, torch.float8_e4m3fn)}
    save(odd, tmp_path / "odd.safetensors")
    assert call("inspect", tmp_path / "odd.safetensors") == 0
