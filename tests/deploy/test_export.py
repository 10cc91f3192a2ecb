"""Exported models compute what the given ones do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spartan.deploy.onnx import export_onnx
from spartan.errors import DeployError
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
