"""Factors of LoRA train while the base is pruned, or held; merged into it, `project` is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import spartan
from spartan import Budget, Sparsifier
from spartan.methods import Spartan

peft = pytest.importorskip("peft", reason="peft is not installed")

STEPS = 20
KEPT = round(0.25 * (16 * 32 + 32 * 32 + 32 * 4))


def base() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def with_factors(model: nn.Module) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "2"], r=4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        optimizer.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def kept(model: nn.Module) -> int:
    return sum(
        int(p.count_nonzero())
        for name, p in model.named_parameters()
        if p.ndim == 2 and "lora" not in name
    )


def test_the_base_is_pruned_while_factors_train() -> None:
    model = with_factors(base())
    model.requires_grad_(True)  # LoRA has frozen the base
    optimizer = adamw(model)
    sparsifier = Sparsifier(model, optimizer, Spartan(), Budget(density=0.25), STEPS)
    assert not any("lora" in weight.name for weight in sparsifier.weights)
    train(model, optimizer)
    sparsifier.finalize()
    assert kept(model) == KEPT
    assert all(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)
    merged = model.merge_and_unload()
    assert kept(merged) > KEPT
    sparsifier.project(merged)
    assert kept(merged) == KEPT


def test_a_sparse_base_is_held_while_factors_train() -> None:
    model = base()
    optimizer = adamw(model)
    sparsifier = Sparsifier(model, optimizer, Spartan(), Budget(density=0.25), STEPS)
    train(model, optimizer)
    sparsifier.finalize()
    adapted = with_factors(model)
    frozen = spartan.freeze(adapted)
    train(adapted, adamw(adapted))
    assert kept(adapted) == KEPT
    merged = adapted.merge_and_unload()
    assert kept(frozen.project(merged)) == KEPT
