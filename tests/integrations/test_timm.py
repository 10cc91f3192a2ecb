"""Models, optimizers and averages of timm, in the loop of its training script."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spartan import Budget, Channel, Sparsifier, purge
from spartan.methods import Magnitude, Spartan
from tests.conftest import ROOT

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm
        from timm.optim import create_optimizer_v2
        from timm.utils import ModelEmaV3
except (ImportError, RuntimeError):
    pytest.skip("timm is not installed, or its torchvision does not fit", allow_module_level=True)

STEPS = 12
OPTIMIZERS = ("sgd", "adamw", "lookahead_adam", "lookahead_lion", "adan", "lion", "lamb", "muon")


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 2}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
    return model


def train(model: nn.Module, optimizer: Any, steps: range, average: Any = None) -> None:
    for step in steps:
        x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(8)).backward()
        optimizer.step()
        if average is not None:
            average.update(model, step=step)


def kept(model: nn.Module, sparsifier: Sparsifier) -> int:
    named = dict(model.named_parameters())
    return sum(int(named[weight.name].count_nonzero()) for weight in sparsifier.weights)


@pytest.mark.parametrize("method", [Spartan(), Magnitude()])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_optimizers_and_its_average_are_exact_and_resume(name: str, method: Any) -> None:
    finals = []
    for stop in (STEPS, 6):
        model = vit()
        optimizer = create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.05)
        average = ModelEmaV3(model, decay=0.9)
        sparsifier = Sparsifier(model, optimizer, method, Budget(density=0.25), STEPS)
        train(model, optimizer, range(stop), average)
        if stop < STEPS:
            states = [one.state_dict() for one in (model, optimizer, average)]
            model = vit(seed=1)
            optimizer = create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.05)
            average = ModelEmaV3(model, decay=0.9)
            sparsifier = Sparsifier(model, optimizer, method, Budget(density=0.25), STEPS)
            for one, state in zip((model, optimizer, average), states, strict=True):
                one.load_state_dict(state)
            train(model, optimizer, range(stop, STEPS), average)
        (_, budget), *_ = sparsifier.budgets()
        sparsifier.project(average.module)
        sparsifier.finalize()
        assert kept(model, sparsifier) == budget.kept
        assert kept(average.module, sparsifier) <= budget.kept
        finals.append([*model.parameters(), *average.module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*finals, strict=True))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224"])
def test_channels_are_pruned_and_purged(name: str) -> None:
    torch.manual_seed(0)
    model = vit() if name.startswith("vit") else timm.create_model(name, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsifier = Sparsifier(model, optimizer, Spartan(), 0.5, 6, Channel())
    kinds = dict(model.named_modules())
    for weight in sparsifier.weights:
        assert getattr(kinds[weight.name.removesuffix(".weight")], "groups", 1) == 1
    train(model, optimizer, range(6))
    sparsifier.finalize()
    small = purge(model.eval(), torch.randn(2, 3, 32, 32))
    sizes = [sum(p.numel() for p in one.parameters()) for one in (small, model)]
    assert sizes[0] < 0.7 * sizes[1]
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_example(tmp_path: Path) -> None:
    import torchvision

    for part in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / "data" / part / label).mkdir(parents=True)
            for i in range(64):
                path = tmp_path / "data" / part / label / f"{i}.png"
                pixels = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
                torchvision.transforms.functional.to_pil_image(pixels).save(path)
    words = ["data", "--model", "resnet10t", "--size", "32", "--epochs", "3"]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / "timm_train.py"), *words],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    assert "accuracy of the average" in done.stdout
