"""Exported models compute what the given ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spartan.deploy.inference_layers import InferenceLinear
from spartan.deploy.onnx import export_onnx
from spartan.errors import DeployError
from tests.deploy.models import reader, text
from tests.deploy.test_accelerate import Untraceable, prune


class Plain(nn.Module):
    """Chains in which a channel has one reader: with and without padding, pooled, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3), nn.GELU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 16, 1), nn.Sigmoid(), nn.Flatten(),
            nn.Linear(16 * 9, 32), nn.ReLU(), nn.Linear(32, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def kill(model: nn.Module, share: float) -> nn.Module:
    """Zero whole outputs of every layer but the last."""
    torch.manual_seed(1)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in layers[:-1]:
        layer.weight.data[torch.rand(len(layer.weight)) < share] = 0.0
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    return prune(model, 1.0)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_export(share: float, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, path = kill(Plain(), share), tmp_path / "plain.onnx"
    exported = export_onnx(model, torch.randn(1, 3, 8, 8), path)
    assert exported.error < 1e-5
    assert bool(exported.removed) == (share > 0)
    assert f"{exported.bytes:,}" in str(exported)
    session = onnxruntime.InferenceSession(str(path))
    x = torch.randn(5, 3, 8, 8)  # another batch size
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.inference_mode():
        assert torch.allclose(torch.from_numpy(found), model(x), atol=1e-5)


def test_what_cannot_be_exported_leaves_no_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    with pytest.raises(DeployError, match="cannot export"):
        export_onnx(Untraceable(), torch.randn(1, 32), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def written(model: nn.Module, example: Any, path: Path) -> Any:
    """Export a model, and return a session of the file."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    export_onnx(model.eval(), example, path)
    return onnxruntime.InferenceSession(str(path))


def test_several_inputs_by_name_of_any_length(tmp_path: Path) -> None:
    model = reader()
    session = written(model, text() | {"mask": torch.ones(2, 5)}, tmp_path / "x.onnx")
    ids, mask = torch.randint(0, 20, (7, 3)), torch.rand(7, 3).round()
    logits, words = session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})
    with torch.inference_mode():
        wanted = model(ids, mask)
    torch.testing.assert_close(torch.from_numpy(logits), wanted["logits"])
    torch.testing.assert_close(torch.from_numpy(words), wanted["words"])


def test_images_of_any_size_where_the_model_takes_them(tmp_path: Path) -> None:
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()]
    pooled = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    session = written(pooled, torch.randn(1, 3, 8, 8), tmp_path / "pooled.onnx")
    x = torch.randn(3, 3, 12, 20)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), pooled(x).detach(), rtol=1e-4, atol=1e-5)
    flat = nn.Sequential(*body, nn.Flatten(), nn.Linear(8 * 64, 2))
    session = written(flat, torch.randn(1, 3, 8, 8), tmp_path / "flat.onnx")
    assert session.get_inputs()[0].shape[1:] == [3, 8, 8]


def test_half_precision_has_a_tolerance_of_its_own(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).half()
    assert written(model, torch.randn(2, 64).half(), tmp_path / "x.onnx")


class Mean(nn.Module):
    """Takes the batch size for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) / len(x)


@pytest.mark.parametrize(
    ("model", "example", "reason"),
    [
        (Mean(), torch.randn(4, 8), r"x\.shape\[0\] instead of len"),
        (nn.Linear(8, 8).bfloat16(), torch.randn(4, 8).bfloat16(), "bfloat16"),
        (nn.Linear(8, 8), torch.randn(4, 9), "does not run"),
        (nn.Linear(8, 8), {"input": torch.tensor(1.0)}, "does not run"),
        (nn.Sequential(InferenceLinear(nn.Linear(8, 8))), torch.randn(4, 8), "given to accelerate"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(
    model: nn.Module, example: Any, reason: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    with pytest.raises(DeployError, match=reason) as told:
        export_onnx(model, example, tmp_path / "x.onnx")
    assert "\n" not in str(told.value)
    assert not list(tmp_path.iterdir())
