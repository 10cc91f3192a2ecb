"""Purged and exported models compute what the given ones do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spartan.deploy.onnx import export_onnx
from spartan.deploy.purging import purge
from spartan.errors import DeployError
from tests.deploy.test_accelerate import Net, Untraceable, prune


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


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_purging_changes_nothing_but_the_size(share: float) -> None:
    model = kill(Plain(), share)
    x = torch.randn(2, 3, 8, 8)
    purged = purge(model, x)
    with torch.inference_mode():
        assert torch.allclose(purged.model(x), model(x), atol=1e-5)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, purged.model))
    assert (after < before - 50) == bool(purged.removed) == (share > 0)
    if share == 0.5:
        # The padded convolution keeps channels whose constant is not zero.
        assert {"body.3", "body.6", "body.9"} <= set(purged.removed)


def test_residual_channels_stay() -> None:
    model = kill(Net(), 0.5)
    x = torch.randn(2, 3, 12, 12)
    purged = purge(model, x)
    assert not any("conv2" in name or "skip" in name for name in purged.removed)
    with torch.inference_mode():
        assert torch.allclose(purged.model(x), model(x), atol=1e-5)


def test_untraceable_models_are_named() -> None:
    with pytest.raises(DeployError, match="cannot trace"):
        purge(Untraceable(), torch.randn(1, 32))


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


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.Flatten(), nn.Linear(20, 3)), (2, 5, 6)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(36, 3)), (2, 3, 8, 8)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(6, 3)), (2, 3, 8, 8)),
        (nn.Sequential(nn.Conv2d(3, 6, 3), nn.GELU("tanh"), nn.Conv2d(6, 3, 3)), (2, 3, 8, 8)),
        (
            nn.Sequential(nn.Linear(6, 8, bias=False), nn.Sigmoid(), nn.Linear(8, 3)).double(),
            (2, 6),
        ),
    ],
)
def test_shapes_that_mislead(model: nn.Module, shape: tuple[int, ...]) -> None:
    model = kill(model, 0.5)
    x = torch.randn(shape, dtype=next(model.parameters()).dtype)
    with torch.inference_mode():
        assert torch.allclose(purge(model, x).model(x), model(x), atol=1e-5)
