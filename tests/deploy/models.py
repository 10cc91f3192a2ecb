"""A model of several inputs, and one input for it, as commands find them by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Reader(nn.Module):
    """Averages what a table has for the unmasked numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        words = self.table(ids)
        if mask is not None:
            words = words * mask[..., None]
        return {"logits": self.head(words.mean(1)), "words": words}


def reader() -> nn.Module:
    """Return the model."""
    return Reader().eval()


def text() -> dict[str, Tensor]:
    """Return an input."""
    return {"ids": torch.arange(10).view(2, 5)}
