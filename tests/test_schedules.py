"""Schedules against the published rows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from spartan.methods import Spartan
from spartan.schedules import interpolate, progress


def test_published_density_and_beta_rows(vectors: dict[str, Any]) -> None:
    for case in vectors["schedules"]:
        total = case["total_iters"]
        warmup = int(case["warmup_frac"] * total)
        last = total - int(case["finetune_frac"] * total)
        assert last == case["last_mask_update_step"]
        rows, cols = case["block_dims"]
        target = case["beta_target"] * math.sqrt(rows * cols)
        for step, density, beta in case["rows_step_density_beta"]:
            shape = case["annealing"]
            way = progress(step, warmup, shape)
            assert interpolate(1.0, case["density_target"], way) == pytest.approx(
                density, abs=1e-12
            )
            way = progress(step, last, shape)
            assert interpolate(case["beta_init"], target, way) == pytest.approx(beta, abs=1e-9)


def test_ends_are_exact() -> None:
    for shape in ("linear", "cosine", "cubic"):
        assert progress(0, 7, shape) == 0.0
        assert progress(7, 7, shape) == 1.0
        assert progress(9, 7, shape) == 1.0
        assert progress(0, 0, shape) == 1.0
        assert progress(3, 7, shape, begin=3) == 0.0


def test_masks_freeze_after_one_last_update() -> None:
    method = Spartan(finetune=0.2)
    assert [s for s in range(101) if method.moves_masks(s, 100)] == list(range(81))
