"""Accuracy of a model on images, and the choice of its device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from spartan.commands.images import ImageData, Images, batches, normalize
from spartan.errors import ConfigError


def loss_and_accuracy(
    model: nn.Module, images: Images, data: ImageData, device: torch.device, workers: int = 0
) -> tuple[float, float]:
    """Return mean loss and accuracy of a model on a set of images."""
    model.eval()
    loss, correct = 0.0, 0
    order = range(len(images.labels))
    with torch.inference_mode():
        for batch, labels in batches(images, 500, order, workers=workers):
            batch, labels = batch.to(device), labels.to(device)
            logits = model(normalize(batch, data))
            loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
            correct += int((logits.argmax(1) == labels).sum())
    return loss / len(images.labels), correct / len(images.labels)


def pick_device(name: str) -> torch.device:
    """Return the named device, or the best there is for `auto`.

    Raises:
        ConfigError: The device does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"The device {name!r} is not available: {reason}") from error
    if device.type not in ("cpu", "cuda"):
        # Budgets are counted in float64, which other devices lack.
        raise ConfigError(f"The device {name!r} is not supported; use cpu or cuda.")
    return device
