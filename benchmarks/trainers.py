"""A training step in trainers that people use, with Spartan over without.

    python benchmarks/trainers.py [--pairs 3]

An encoder of 21 million parameters (BERT, 10 layers of width 384), 8 x 128 tokens, AdamW,
float32: in a plain loop, in transformers' Trainer and in Lightning. Spartan is at its budget of
5 % from the first step, and masks move; on the way there it looks at the weights once more, and in
the last fifth of a run it costs half as much. Runs without and with it alternate, and of each steps
11 to 18 are measured. First comes the median over pairs of the ratio of median steps, with the
smallest and the largest.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from torch import nn

from spartan import Sparsifier, kernels
from spartan.integrations.lightning import Sparsify
from spartan.integrations.transformers import SparsifierCallback
from spartan.methods import Spartan

FIRST, LAST, STEPS = 10, 18, 1000  # measured are those after FIRST, until LAST, of STEPS
METHOD, DENSITY, LR = Spartan(warmup=0.0), 0.05, 1e-4


def encoder() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=8192, hidden_size=384, num_hidden_layers=10, num_attention_heads=6,
        intermediate_size=1536, num_labels=2,
    )  # fmt: skip
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def examples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(8192, (8 * LAST, 128), generator=generator)
    return [{"input_ids": row, "labels": i % 2} for i, row in enumerate(rows)]


class Clock:
    """Notes when steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def tick(self) -> bool:
        """Return whether enough steps were measured."""
        self.ends.append(time.perf_counter())
        return len(self.ends) == LAST

    @property
    def step(self) -> float:
        pairs = zip(self.ends[FIRST - 1 :], self.ends[FIRST:], strict=False)
        return statistics.median(later - earlier for earlier, later in pairs)


def plain(sparse: bool) -> float:
    model, clock = encoder().train(), Clock()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    if sparse:
        Sparsifier(model, optimizer, METHOD, DENSITY, STEPS)
    for batch in torch.utils.data.DataLoader(examples(), 8):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if clock.tick():
            break
    return clock.step


def in_transformers(sparse: bool) -> float:
    clock = Clock()

    class Ticking(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = clock.tick()

    callbacks: list[Any] = [Ticking()]
    if sparse:
        callbacks.append(SparsifierCallback(METHOD, DENSITY))
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=STEPS, use_cpu=True, report_to=[], disable_tqdm=True,
            learning_rate=LR, save_strategy="no", logging_steps=1000,
        )  # fmt: skip
        trainer = transformers.Trainer(
            encoder(), arguments, train_dataset=examples(), callbacks=callbacks
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return clock.step


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = encoder().train()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LR)


def in_lightning(sparse: bool) -> float:
    clock = Clock()

    class Ticking(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.should_stop = clock.tick()

    callbacks: list[Callback] = [Ticking()]
    if sparse:
        callbacks.append(Sparsify(METHOD, DENSITY, total_steps=STEPS))
    trainer = L.Trainer(
        max_steps=STEPS, accelerator="cpu", callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=1.0, min_steps=1,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(examples(), 8))
    return clock.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    numel = sum(p.numel() for p in encoder().parameters())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {kernels.backend()}")
    print(f"{numel / 1e6:.1f} million parameters, 8 x 128 tokens")
    kinds: dict[str, Callable[[bool], float]] = {
        "plain loop": plain, "transformers": in_transformers, "Lightning": in_lightning,
    }  # fmt: skip
    for name, run in kinds.items():
        found = [(run(False), run(True)) for _ in range(args.pairs)]
        ratios = sorted(sparse / dense for dense, sparse in found)
        middle = statistics.median(ratios)
        dense, sparse = (1e3 * statistics.median(side) for side in zip(*found, strict=True))
        print(
            f"{middle:.3f} x ({ratios[0]:.3f} to {ratios[-1]:.3f})  {name}: "
            f"{dense:.0f} ms without, {sparse:.0f} ms with",
            flush=True,
        )


if __name__ == "__main__":
    main()
