"""Built-in models (MLP, ResNet-20, ViT), and models of timm or a factory by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spartan.errors import ConfigError, MissingExtraError, did_you_mean


def mlp(channels: int, image_size: int, classes: int, width: int = 256) -> nn.Module:
    """Return a multilayer perceptron with two hidden, batch-normalised layers."""
    inputs = channels * image_size * image_size
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def resnet20(channels: int, image_size: int, classes: int, width: int = 16) -> nn.Module:
    """Return the CIFAR ResNet-20 of He et al. (2016, section 4.2), any input size.

    Args:
        channels: Input channels.
        image_size: Unused; the network is fully convolutional up to a global average pool.
        classes: Outputs.
        width: Channels of the first stage; the others have twice and four times as many.
    """
    return ResNet(channels, classes, width=width, blocks=3)


def vit(channels: int, image_size: int, classes: int) -> nn.Module:
    """Return a small vision transformer: 6 layers, width 192, 3 heads, 8 x 8 patches a side."""
    return VisionTransformer(channels, image_size, classes)


MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "mlp": mlp,
    "resnet20": resnet20,
    "vit": vit,
}


def build_model(name: str, channels: int, image_size: int, classes: int) -> nn.Module:
    """Make a model by name.

    Args:
        name: A built-in name, `timm:NAME`, or `package.module:factory`. A factory gets those of
            the keywords channels, image_size and classes (or timm's in_chans, img_size,
            num_classes) that it takes.
        channels: Channels of the images.
        image_size: Their height and width.
        classes: Number of classes.

    Raises:
        ConfigError: No such model, or its factory fails.
        MissingExtraError: timm is not installed.
    """
    if name in MODELS:
        return MODELS[name](channels, image_size, classes)
    if name.startswith("timm:"):
        return _timm_model(name.removeprefix("timm:"), channels, image_size, classes)
    if ":" in name:
        return _factory_model(name, channels, image_size, classes)
    raise ConfigError(
        f"Unknown model {name!r}; {did_you_mean(name, MODELS)} (or timm:NAME, or "
        "package.module:factory)"
    )


def require_trusted(name: str, folder: str | Path, trust: bool) -> None:
    """Refuse to import and call what a folder names as its model, unless its writer is trusted.

    Args:
        name: The model, as the folder's configuration has it.
        folder: Whose configuration that is.
        trust: Whether the user said so.

    Raises:
        ConfigError: It is neither built in nor of timm or transformers, and not trusted.
    """
    if trust or ":" not in name or name.startswith(("timm:", "transformers:")):
        return
    raise ConfigError(
        f"The model of {str(folder)!r} is the function {name!r}, which would be imported and "
        "called. If you trust who wrote the folder, say so with --trust."
    )


def pretrained_timm(name: str) -> nn.Module:
    """Make a model of timm with its pretrained weights.

    Raises:
        ConfigError: timm cannot make it, or not fetch its weights.
        MissingExtraError: timm is not installed.
    """
    try:
        model: nn.Module = _timm(name).create_model(name, pretrained=True)
    except MissingExtraError:
        raise
    except Exception as error:
        raise ConfigError(f"timm cannot make {name!r} with its weights: {error}") from error
    return model


def _timm(name: str) -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise MissingExtraError(
            f"timm:{name} needs timm, which does not import here ({error}); install timm and a "
            "torchvision that matches this torch."
        ) from error
    return timm


def _timm_model(name: str, channels: int, image_size: int, classes: int) -> nn.Module:
    timm = _timm(name)
    try:
        sizes = {"in_chans": channels, "num_classes": classes}
        try:
            model: nn.Module = timm.create_model(name, img_size=image_size, **sizes)
        except TypeError:  # convolutional networks take any size and have no such argument
            model = timm.create_model(name, **sizes)
    except Exception as error:
        raise ConfigError(f"timm cannot make the model {name!r}: {error}") from error
    return model


def _factory_model(name: str, channels: int, image_size: int, classes: int) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"Cannot load the model {name!r}: {error}") from error
    known = {
        "channels": channels,
        "in_chans": channels,
        "image_size": image_size,
        "img_size": image_size,
        "classes": classes,
        "num_classes": classes,
    }
    try:
        takes = inspect.signature(factory).parameters
        model = factory(**{key: value for key, value in known.items() if key in takes})
    except Exception as error:
        raise ConfigError(f"The factory {name!r} failed: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"The factory {name!r} returned {type(model).__name__}, not a Module.")
    return model


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a parameter-free shortcut (option A of He et al.)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, inputs, H, W) to (batch, outputs, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.padding:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


class ResNet(nn.Module):
    """Three stages of basic blocks; its keys are those of the usual CIFAR checkpoints."""

    def __init__(self, channels: int, classes: int, width: int, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, 1)
        self.layer2 = self._stage(width, 2 * width, blocks, 2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, channels, H, W) to logits (batch, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


class VisionTransformer(nn.Module):
    """Pre-norm transformer encoder over image patches, with a mean-pooled linear head."""

    def __init__(
        self,
        channels: int,
        image_size: int,
        classes: int,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
    ) -> None:
        super().__init__()
        patch = max(1, image_size // 8)
        self.patches = nn.Conv2d(channels, width, patch, patch)
        positions = (image_size // patch) ** 2
        self.position = nn.Parameter(torch.randn(positions, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.1, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.encoder = nn.TransformerEncoder(
            layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, channels, H, W) to logits (batch, classes)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.encoder(tokens).mean(dim=1))
        return logits


def example_images(channels: int, image_size: int, **kwargs: Any) -> Tensor:
    """Return one zero image, for tracing."""
    return torch.zeros(1, channels, image_size, image_size, **kwargs)
