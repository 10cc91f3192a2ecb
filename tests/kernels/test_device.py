"""What runs on a GPU, checked without one.

Tensors on the meta device have no values, so any operation that waits for a value raises there;
and with chunks made on the CPU as a GPU would make them, the results must be the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from spartan import kernels
from spartan.kernels import Dual, ScanRequest, Scores, scan, units
from spartan.kernels.scanning import _on_device
from spartan.kernels.selection import _BINS, _count
from spartan.kernels.units import Grid
from spartan.selection import soft
from spartan.selection.hard import select_rows
from spartan.selection.soft import soft_rows


@pytest.fixture(autouse=True)
def torch_kernels() -> Iterator[None]:
    with kernels.using("torch"):
        yield


def scores_on(device: str, dtype: torch.dtype, absolute: bool = True) -> Scores:
    sizes = [(300, 40), (7,), (200_000,), (64, 3, 3, 3)]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
    return Scores(tensors, [1.0, 1.0, 0.5, 1.0], [1.0, 1.0, 2.0, 1.0], absolute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_scan_waits_for_nothing_until_its_one_read_back(dtype: torch.dtype) -> None:
    scores = scores_on("meta", dtype)
    row = _on_device(ScanRequest(scores, 20_000.0, dual=Dual(20.0, 0.5, 0.1)))
    assert row.shape == (8,)
    assert row.device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        row.tolist()


def test_writing_and_pulling_back_wait_for_nothing() -> None:
    tensors = list(scores_on("meta", torch.float32).tensors)
    masks = [torch.empty(x.shape, dtype=torch.bool, device="meta") for x in tensors]
    duals = [Dual(20.0, 0.5, 0.1)] * 4
    ones = [1.0] * 4
    cuts = [(0.5, x.numel() // 2) for x in tensors]
    copies = [torch.empty_like(x) for x in tensors]
    kernels.project(tensors, copies, tensors, masks, ones, cuts, duals)
    kernels.project(tensors, [], tensors, masks, ones, None, None)
    kernels.pull_back(copies, tensors, ones, ones, duals)
    kernels.mask_(copies, masks)
    # A meta tensor has no entries: who had waited for one would have raised.
    assert all(x.device.type == "meta" for x in (*tensors, *copies, *masks))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_counting_without_waiting_counts_the_same(weighted: bool, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    digit = torch.randint(0, _BINS, (10_000,), generator=generator, dtype=torch.int32)
    weights = torch.rand(10_000, generator=generator).double() if weighted else None
    hit = torch.rand(10_000, generator=generator) < 0.3 if masked else None
    expected = _count(digit, hit, weights, waits=True)
    torch.testing.assert_close(_count(digit, hit, weights, waits=False), expected)


def test_many_requests_are_read_back_together(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    original = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(1) or original(self))
    requests = [ScanRequest(scores_on("cpu", torch.float32), b) for b in (10.0, 1000.0, 50_000.0)]
    assert len(scan(requests)) == 3
    assert len(reads) == 1
    # Where the budget ends among equal scores: how many there are, and where they stop to fit.
    equal = Scores([torch.ones(500_000)], [1.0], [1.0], absolute=True)
    assert scan([ScanRequest(equal, 123_456.0)])[0].cutoff.tie_ends == [123_456]
    assert len(reads) == 3


def test_rows_and_units_wait_for_nothing() -> None:
    scores = torch.empty(100, 8, device="meta")
    assert soft_rows(scores, 3.0, 12.0, scores.amax(1, keepdim=True)).shape == (100, 8)
    assert select_rows(scores, 3).shape == (100, 8)
    grid = Grid((16, 32, 9), (4, 8, 1), (36, 9, 1))
    x, values = torch.empty(16, 32, 9, device="meta"), torch.empty(4, 4, 9, device="meta")
    assert units.pool_magnitudes(x, grid, (4, 4, 9)).shape == (4, 4, 9)
    units.scale(x, values, torch.empty_like(x), x, grid)
    units.pull_back_units(x, x, values, values, grid)


def test_rows_are_solved_in_the_passes_a_gpu_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(2000, 16, generator=torch.Generator().manual_seed(0)) * 3
    for beta in (1.0, 100.0, 1e5):
        thresholds = scores.sort(descending=True).values[:, 3:4]
        expected = soft_rows(scores, 4, beta, thresholds)
        monkeypatch.setattr(soft, "_MAX_PASSES", soft._ROW_PASSES)
        torch.testing.assert_close(soft_rows(scores, 4, beta, thresholds), expected)
        monkeypatch.undo()
