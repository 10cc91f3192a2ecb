"""Built-in models and models by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spartan.commands.models import MODELS, build_model, resnet20
from spartan.errors import ConfigError, MissingExtraError


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 20)])
def test_models_take_images_of_any_size(name: str, channels: int, size: int) -> None:
    model = build_model(name, channels, size, 7)
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_resnet20_is_the_usual_one(cifar10: str) -> None:
    model = resnet20(3, 32, 10)
    assert sum(p.numel() for p in model.parameters()) == 269_722
    model.load_state_dict(load_file(Path(cifar10) / "resnet20.safetensors"))


def test_models_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(
        "import torch\n"
        "def tiny(num_classes, in_chans=3):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(num_classes))\n"
        "def broken():\n    raise ValueError('no')\n"
        "def number():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert build_model("my_models:tiny", 1, 4, 5)(torch.zeros(1, 1, 4, 4)).shape == (1, 5)
    with pytest.raises(ConfigError, match="failed: no"):
        build_model("my_models:broken", 1, 4, 5)
    with pytest.raises(ConfigError, match="returned int"):
        build_model("my_models:number", 1, 4, 5)
    with pytest.raises(ConfigError, match="Cannot load"):
        build_model("my_models:missing", 1, 4, 5)
    with pytest.raises(ConfigError, match="did you mean 'resnet20'"):
        build_model("resnet2", 1, 4, 5)
    sys.modules.pop("my_models")


def test_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in with timm's one function: the real package needs a matching torchvision.
    (tmp_path / "timm.py").write_text(
        "import torch\n"
        "def create_model(name, in_chans, num_classes):\n"
        "    assert name == 'some_net', f'Unknown model ({name})'\n"
        "    return torch.nn.Conv2d(in_chans, num_classes, 1)\n"
    )
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match="needs timm"):
        build_model("timm:some_net", 3, 8, 5)
    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.syspath_prepend(tmp_path)
    assert build_model("timm:some_net", 3, 8, 5)(torch.zeros(1, 3, 8, 8)).shape[1] == 5
    with pytest.raises(ConfigError, match="Unknown model"):
        build_model("timm:other", 3, 8, 5)
    sys.modules.pop("timm")
