"""The scripts in `examples/` run from beginning to end, on small data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"


def run(folder: Path, name: str, *words: object) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, words)],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_each_is_short() -> None:
    lengths = {
        path.name: len(path.read_text(encoding="utf-8").splitlines())
        for path in EXAMPLES.glob("*.py")
    }
    assert lengths
    assert max(lengths.values()) <= 60


def test_plain_torch_with_an_average(tmp_path: Path) -> None:
    name = "plain_torch_with_ema.py"
    run(tmp_path, name, "--epochs", 3)
    (tmp_path / "model.safetensors").unlink()
    assert "density 5.00%" in run(tmp_path, name, "--epochs", 3)  # goes on from its checkpoint
    assert (tmp_path / "model.safetensors").exists()


def test_text_classification(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("datasets", reason="datasets is not installed")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "story"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    model = tmp_path / "model"
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(model)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(words), intermediate_size=32, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(model)
    (tmp_path / "data").mkdir()
    rows = "".join(f"{word} film,{label}\n" for word, label in [("good", 1), ("bad", 0)] * 16)
    for part in ("train", "test"):
        (tmp_path / "data" / f"{part}.csv").write_text(f"text,label\n{rows}")
    told = run(tmp_path, "transformers_text_classification.py", "--model", model, "--data", "data")
    assert "eval_accuracy" in told
    saved = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "sparse-classifier"
    )
    layers = [p for name, p in saved.bert.encoder.named_parameters() if p.ndim == 2]
    kept = sum(int(p.count_nonzero()) for p in layers)
    assert 0 < kept < 0.5 * sum(p.numel() for p in layers)


def test_cifar10_with_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    columns = {"image": datasets.Image(), "label": datasets.Value("int64")}
    pixels = torch.randint(256, (64, 32, 32, 3), dtype=torch.uint8).numpy()
    rows = {"image": [*pixels], "label": [i % 10 for i in range(64)]}
    for part in ("train", "test"):
        made = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
        made.to_parquet(tmp_path / "data" / f"{part}.parquet")
    run(tmp_path, "lightning_cifar10.py", "--data", "data", "--epochs", 5)
    best = max(
        tmp_path.glob("lightning_logs/*/checkpoints/*.ckpt"), key=lambda p: p.stat().st_mtime
    )
    state = torch.load(best, weights_only=False)["state_dict"]
    weights = [w for name, w in state.items() if w.ndim > 1]
    kept = sum(int(w.count_nonzero()) for w in weights)
    assert kept == round(0.05 * sum(w.numel() for w in weights))
