"""`spartan world`, as a user calls it."""

from __future__ import annotations

import functools
import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from spartan.__main__ import main
from spartan.commands.terminal.display import Phases
from spartan.commands.world.job import WorldJob, WorldRun
from spartan.files import load_tensors
from spartan.world_model.adaptation import adapt

QUICK = ("--steps", 40, "--transitions", 2000, "--width", 16, "--hidden", 16, "--tau-factor", 0.999)


def spartan(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return int(str(stopped.value.code))


@pytest.fixture(scope="module", autouse=True)
def _few_states() -> Iterator[None]:
    """Score on a tenth of the states, and fit tokens for a tenth of the steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spartan.commands.world.job._HELD_OUT", 600)
        patch.setattr("spartan.commands.world.scores.SCORED", 1_000)
        patch.setattr("spartan.commands.world.scores._TRAJECTORIES", 50)
        patch.setattr("spartan.commands.world.command.adapt", functools.partial(adapt, steps=60))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "balls"
    assert spartan("world", "train", "--env", "balls", *QUICK, "--edges", 3, "--out", folder) == 0
    return folder


def test_train(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    models = {f"{m}.safetensors" for m in ("dense", "identity", "sparse", "nearest", "global")}
    assert models | {"config.json", "results.json", "metrics.jsonl", "report.html"} <= names
    assert "checkpoint.safetensors" not in names
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert len(results["scores"]) == 7
    assert results["influence_held"] == 0
    for score in results["scores"]:
        if score["name"] == "no interaction":
            assert score["graphs"]["shd"] == pytest.approx(score["graphs"]["true_edges"])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 5
    assert page.count("<img") == 7
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    with Image.open(run / "world.gif") as animation:
        assert animation.n_frames == 60
    rows = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    ends = {row["split"]: row["step"] for row in rows}
    assert ends == {"dense": 40, "identity": 50, "sparse": 90, "nearest": 110, "global": 130}


def test_evaluate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert spartan("world", "evaluate", run) == 0
    shown = capsys.readouterr().out
    assert "SPARTAN" in shown
    assert "constant" in shown
    assert "edges per state at most 3: kept" in shown


def test_adapt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert spartan("world", "adapt", run, "--trajectories", 2, "--length", 5) == 0
    shown = capsys.readouterr().out
    errors = {
        name: float(value)
        for name, value in re.findall(
            r"^  (not adapted|best known|adapted).*? (\d\.\d{4})", shown, re.M
        )
    }
    assert set(errors) == {"not adapted", "best known", "adapted"}
    assert errors["best known"] <= errors["not adapted"] * 1.5
    tensors, facts = load_tensors(run / "token-3.safetensors")
    assert facts["intervention"] == "gravity + drag on the left"
    assert tensors["token"].shape == (16,)


def test_show(run: Path, tmp_path: Path) -> None:
    assert spartan("world", "show", run, "--steps", 4, "--out", tmp_path / "a.gif") == 0
    for name in ("pong", "create"):
        path = tmp_path / f"{name}.gif"
        words = ("--env", name, "--intervention", 2, "--steps", 4, "--out", path)
        assert spartan("world", "show", *words) == 0
        with Image.open(path) as animation:
            assert animation.n_frames <= 4


def test_an_interrupted_run_continues_to_the_same_models(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = tmp_path / "parts"
    tick = Phases.tick

    def interrupt(self: Phases, name: str, step: int, total: int) -> None:
        tick(self, name, step, total)
        if (name, step) == ("sparse", 25):
            signal.raise_signal(signal.SIGINT)

    words = ("--env", "balls", *QUICK, "--edges", 3, "--out", parts)
    with monkeypatch.context() as patch:
        patch.setattr(Phases, "tick", interrupt)
        assert spartan("world", "train", *words) == 128 + signal.SIGINT
    assert (parts / "checkpoint.safetensors").exists()
    assert not (parts / "sparse.safetensors").exists()
    assert spartan("world", "train", "--resume", parts) == 0
    for name in ("dense", "identity", "sparse", "nearest", "global"):
        expected, _ = load_tensors(run / f"{name}.safetensors")
        found, _ = load_tensors(parts / f"{name}.safetensors")
        assert all((expected[key] == found[key]).all() for key in expected), name
    for name in ("metrics.jsonl", "results.json"):
        assert (parts / name).read_text(encoding="utf-8") == (run / name).read_text(
            encoding="utf-8"
        )


def test_a_refined_run_shows_what_it_was_refined_from(tmp_path: Path) -> None:
    out = tmp_path / "refined"
    words = ("--env", "particles", *QUICK, "--no-baselines", "--refine-steps", 30)
    assert spartan("world", "train", *words, "--transitions", 300, "--out", out) == 0
    titles = [
        score["name"]
        for score in json.loads((out / "results.json").read_text(encoding="utf-8"))["scores"]
    ]
    assert titles[:2] == ["SPARTAN", "SPARTAN, unrefined"]
    refined, _ = load_tensors(out / "sparse.safetensors")
    unrefined, _ = load_tensors(out / "unrefined.safetensors")
    assert not all((refined[key] == unrefined[key]).all() for key in refined)
    rows = [
        json.loads(line)
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    ends = {row["split"]: row["step"] for row in rows}
    assert ends == {"dense": 40, "identity": 50, "unrefined": 90, "sparse": 120}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 5
    assert "SPARTAN, unrefined" in page

    (out / "sparse.safetensors").unlink()
    world, config = WorldRun.open(out)
    WorldJob(config).fit(world, tick=lambda *_: None, say=lambda _: None)
    again, _ = load_tensors(out / "sparse.safetensors")
    assert all((refined[key] == again[key]).all() for key in refined)


def test_a_folder_of_an_earlier_version_takes_defaults(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(run, old)
    options = json.loads((old / "config.json").read_text(encoding="utf-8"))
    for name in ("refine_steps", "refine_price", "token_layers"):
        del options[name]
    (old / "config.json").write_text(json.dumps(options))
    assert spartan("world", "show", old, "--steps", 2) == 0
    for damaged in (options | {"colour": "red"}, options | {"width": "wide"}):
        (old / "config.json").write_text(json.dumps(damaged))
        assert spartan("world", "show", old, "--steps", 2) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--env", "particle"), "did you mean 'particles'"),
        (("train", "--edges", "2", "--error", "0.1"), "not both"),
        (("train", "--edges", "-1"), "must be positive"),
        (("train", "--edges", "12"), "never more than 12"),
        (("train", "--error", "inf"), "must be positive"),
        (("train", "--tau-factor", "0"), "must be positive"),
        (("train", "--steps", "0"), "at least 1"),
        (("train", "--refine-steps", "-1"), "must not be negative"),
        (("train", "--refine-steps", "9", "--edges", "2"), "not with --edges"),
        (("train", "--refine-price", "0"), "must be positive"),
        (("train", "--layers", "0"), "at least 1"),
        (("train", "--transitions", "1"), "are needed"),
        (("train", "--device", "tpu"), "not available"),
        (("train", "--resume", "nowhere"), "holds no world model"),
        (("evaluate", "nowhere"), "holds no world model"),
        (("show",), "one of the two"),
        (("show", "--env", "chess"), "Unknown environment"),
        (("show", "--env", "pong", "--steps", "0"), "at least 1"),
        (("show", "--env", "pong", "--intervention", "curved"), "did you mean 'curved ball'"),
    ],
)
def test_bad_input(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert spartan("world", *words) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_meaningless_target_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--env",
        "particles",
        *QUICK,
        "--no-baselines",
        "--error",
        5,
        "--out",
        tmp_path / "run",
    )
    assert spartan("world", "train", *words) == 2
    assert re.search(
        r"budget is 5, and .* reaches \d\.\d+: the empty graph", capsys.readouterr().err
    )


def test_runs_are_kept_apart(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert spartan("world", "train", "--env", "balls", "--out", run) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert spartan("world", "train", "--resume", run, "--steps", 50) == 2
    assert "cannot become 50" in capsys.readouterr().err
    assert spartan("report", run) == 2
    assert "spartan world" in capsys.readouterr().err
    assert spartan("world", "show", run, "--intervention", 3) == 2
    assert "not seen in training" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"command": "adapt"}')
    assert spartan("world", "evaluate", tmp_path) == 2
    assert "was not written by" in capsys.readouterr().err


def test_a_damaged_model_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((run / "config.json").read_text(encoding="utf-8"))
    assert spartan("world", "show", tmp_path) == 2
    assert "no sparse model yet" in capsys.readouterr().err
    (tmp_path / "sparse.safetensors").write_bytes(b"nothing")
    assert spartan("world", "show", tmp_path) == 2
    assert "damaged" in capsys.readouterr().err


def test_the_group_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert spartan("world", "--help") == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("train", "evaluate", "adapt", "show"))
