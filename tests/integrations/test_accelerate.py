"""Optimizers that accelerate has prepared are taken as they are; its checkpoints hold the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spartan import Budget, Sparsifier
from spartan.methods import ConstrainedL0, Magnitude, Spartan

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

STEPS, HALF = 20, 9


def run(
    method: Callable[[], Any], folder: Path, until: int = STEPS, resume: str = ""
) -> dict[str, Tensor]:
    """Train with accumulation and clipping; stop at a step and save, or go on from there."""
    torch.manual_seed(len(resume))
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model: Any = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)

    def attach() -> Sparsifier:
        return Sparsifier(model, optimizer, method(), Budget(density=0.25), STEPS)

    if resume != "before":
        sparsifier = attach()
    if resume:
        accelerator.load_state(str(folder))
    if resume == "before":
        sparsifier = attach()
    assert sparsifier.step == (HALF if resume else 0)
    for part in range(2 * sparsifier.step, 2 * until):
        with accelerator.accumulate(model):
            x = torch.randn(32, 16, generator=torch.Generator().manual_seed(part))
            accelerator.backward(nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    if until < STEPS:
        accelerator.save_state(str(folder))
        return {}
    sparsifier.finalize()
    assert sparsifier.density == 0.25
    found: dict[str, Tensor] = model.state_dict()
    return found


@pytest.mark.filterwarnings("ignore:The gates of .* reached an expected density")
@pytest.mark.parametrize("resume", ["before", "after"])
@pytest.mark.parametrize("method", [Spartan, Magnitude, lambda: ConstrainedL0(gate_lr=1.0)])
def test_saved_and_loaded_without_a_word_more(
    method: Callable[[], Any], resume: str, tmp_path: Path
) -> None:
    whole = run(method, tmp_path)
    run(method, tmp_path, until=HALF)
    again = run(method, tmp_path, resume=resume)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
