"""`spartan adapt`, as a user calls it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spartan.__main__ import main
from spartan.adapters import AdapterModel
from spartan.commands.adapt.texts import load_texts
from spartan.files import load_tensors
from tests.adapters.models import minilm
from tests.conftest import THOROUGH

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

COLOURS = {"warm": ["red", "orange", "yellow"], "cold": ["blue", "green", "violet"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random BERT with a tokenizer, as transformers saves them."""
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "is", "sky", "house"]
    words += [colour for colours in COLOURS.values() for colour in colours]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, initializer_range=0.2, hidden_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "colours.csv"
    rows = [
        f"the {thing} is {'a ' * i}{colour},{label}"
        for label, colours in COLOURS.items()
        for colour in colours
        for thing in ("sky", "house")
        for i in range(4)
    ]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


def spartan(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return int(str(stopped.value.code))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert spartan("adapt", *words) == 2
    return " ".join(capsys.readouterr().err.split())


def test_adapters_are_trained_compared_and_saved(
    model: str, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    names = ["memory", "houlsby", "pfeiffer", "lora", "layernorm", "probe", "full"]
    words = ["--epochs", "2", "--lr", "0.01", "--batch-size", "8", "--test-per-class", "4"]
    assert spartan("adapt", model, "--data", table, "--adapter", *names, *words, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "40 texts of 2 classes, 8 held out" in printed
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["classes"] == ["cold", "warm"]
    assert [row["name"] for row in results["adapters"]] == names
    for row in results["adapters"]:
        assert [epoch["epoch"] for epoch in row["rows"]] == [1, 2]
        assert row["bytes"] == (out / row["name"] / "adapter_model.safetensors").stat().st_size
        assert row["train_per_second"] > 0 < row["infer_per_second"]
    memory = results["adapters"][0]
    losses = [epoch["loss"] for epoch in memory["rows"]]
    assert losses[-1] < losses[0]
    # (N + 2 M) H of two layers, and the head
    assert memory["parameters"] - memory["head_parameters"] == 2 * 112 * 32
    assert memory["head_parameters"] == 2 * 32 + 2
    ((shares, *_),) = [list(memory["specializations"].values())]
    assert [len(row) for row in shares["shares"]] == [16, 16]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1 + 2
    assert not re.search(r'(src|href)="http', page)
    # What was saved goes into a fresh model.
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    AdapterModel.from_pretrained(base, out / "memory")


def test_equal_seeds_give_equal_adapters(model: str, table: Path, tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        out = tmp_path / name
        assert spartan("adapt", model, "--data", table, "--epochs", "1", "--out", out) == 0
        written.append(load_tensors(out / "memory" / "adapter_model.safetensors"))
    assert written[0][1] == written[1][1]
    for name, tensor in written[0][0].items():
        assert torch.equal(tensor, written[1][0][name])


def test_bad_input(
    model: str, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--data", table, "--out", tmp_path / "out"]
    assert "did you mean 'memory'" in refused(capsys, model, *rest, "--adapter", "memry")
    assert "top_k=17 must be from 1" in refused(capsys, model, *rest, "--top-k", "17")
    assert "--epochs 0 must be" in refused(capsys, model, *rest, "--epochs", "0")
    assert "--per-class 0 must be" in refused(capsys, model, *rest, "--per-class", "0")
    assert "no config.json" in refused(capsys, tmp_path, *rest)
    assert "layer 2; there are 2" in refused(capsys, model, *rest, "--layers", "2")
    assert "up to 512 tokens" in refused(capsys, model, *rest, "--max-length", "600")
    words = refused(capsys, model, *rest, "--per-class", "99")
    assert "has 22 training texts; 99 are asked for" in words
    words = refused(capsys, model, *rest, "--test-per-class", "24")
    assert "has 24 texts: 24 cannot be held out" in words
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "neither a table" in refused(capsys, model, "--data", folder, "--out", tmp_path / "x")
    table = folder / "train.csv"
    table.write_text("words,label\na,b\n")
    assert "text and label are needed" in refused(capsys, model, "--data", table, "--out", folder)
    table.write_text("text,label\na,b\nc,\n")
    assert "text 2: the text or its label is missing" in refused(
        capsys, model, "--data", table, "--out", tmp_path / "x"
    )
    table.write_text("text,label\na,b\n")
    assert "two are the least" in refused(capsys, model, "--data", table, "--out", tmp_path / "x")
    assert "no such package" in refused(
        capsys, model, "--data", "docs:nosuch", "--out", tmp_path / "x"
    )
    assert "no such package" in refused(capsys, model, "--data", "docs:", "--out", tmp_path / "x")
    assert "lower --lr" in refused(capsys, model, *rest, "--lr", "1e30", "--head-lr", "1e30")
    assert not list((tmp_path / "out").glob("*"))
    assert not (tmp_path / "x").exists()


def test_transformers_is_asked_for(
    model: str, table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "spartan-torch[adapters]" in refused(capsys, model, "--data", table)


def test_what_was_written_is_not_a_run(
    model: str, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    words = [
        "adapt",
        model,
        "--data",
        str(table),
        "--adapter",
        "probe",
        "--epochs",
        "1",
        "--out",
        out,
    ]
    assert spartan(*words) == 0
    assert spartan(*words) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert spartan("report", out) == 2
    assert "written by `spartan adapt`" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_every_kind(suffix: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows: dict[str, list[Any]] = {"text": [f"text {i}" for i in range(6)], "label": [0, 1, 2] * 2}
    whole = datasets.Dataset.from_dict(rows)
    for name in ("train", "test"):
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "parquet":
            whole.to_parquet(path)
        elif suffix == "jsonl":
            whole.to_json(path)
        else:
            whole.to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)
    data = load_texts(str(tmp_path), None, None, 0)
    assert data.classes == ["0", "1", "2"]
    assert (data.train.texts, data.train.labels) == (rows["text"], rows["label"])
    assert len(data.test) == 6


def test_documentation_is_split_by_class_without_overlap() -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    data = load_texts("docs:scipy", 20, 20, 3)
    assert {"stats", "signal", "linalg", "optimize"} <= set(data.classes)
    for part in (data.train, data.test):
        assert [part.labels.count(i) for i in range(len(data.classes))] == [20] * len(data.classes)
    assert load_texts("docs:scipy", 20, 20, 3) == data
    assert load_texts("docs:scipy", 20, 20, 4) != data
    pairs = [set(zip(part.texts, part.labels, strict=True)) for part in (data.train, data.test)]
    assert not pairs[0] & pairs[1]


def test_a_memory_learns_topics(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    scores: dict[str, list[float]] = {"memory": [], "probe": []}
    for seed in range(3 if THOROUGH else 1):
        out = tmp_path / str(seed)
        words = ["--per-class", "6", "--test-per-class", "8", "--max-length", "16", "--epochs", "4"]
        words += ["--lr", "0.01", "--seed", str(seed), "--out", str(out)]
        start = ["adapt", minilm(), "--data", "docs:scipy", "--adapter", "memory", "probe"]
        assert spartan(*start, *words) == 0
        for row in json.loads((out / "results.json").read_text(encoding="utf-8"))["adapters"]:
            scores[row["name"]].append(row["accuracy"])
            for found in row["specializations"].values():
                assert found["p"] <= 0.05
    assert sum(scores["memory"]) > sum(scores["probe"]) > 0
