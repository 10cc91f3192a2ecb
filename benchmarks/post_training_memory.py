"""Peak memory of compressing a transformer of 100 million parameters.

    python benchmarks/post_training_memory.py

Twelve layers of width 768 with an embedding of 32,000 tokens, random weights, 64 samples of 256
tokens. The peak is that of the whole process; what it was before the compression is printed too.
"""

from __future__ import annotations

import argparse
import resource

import torch
from torch import Tensor, nn

import spartan


class LanguageModel(nn.Module):
    """Embedding, twelve pre-norm layers, and a head tied to the embedding."""

    def __init__(self, tokens: int = 32_000, width: int = 768, depth: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        layer = nn.TransformerEncoderLayer(
            width, 12, 4 * width, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids (batch, length) to the logits of the last token."""
        states = self.layers(self.embedding(ids))
        return states[:, -1] @ self.embedding.weight.T


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = LanguageModel().eval()
    ids = torch.randint(0, 32_000, (options.samples, options.length))
    total = sum(p.numel() for p in model.parameters())
    before = peak()
    report = spartan.compress(model, ids, sparsity=0.5, method=options.method, batch_size=8)
    print(
        f"{total:,} parameters: peak {peak():.2f} GiB, {before:.2f} before; "
        f"{report.seconds:.0f} s, {report.nonzero:,} of {report.numel:,} weights kept"
    )


if __name__ == "__main__":
    main()
