"""Native kernels and their torch versions give the same masks, at every instruction set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spartan import NM, Block, Budget, Channel, Sparsifier, hard_topk, kernels
from spartan.kernels import Dual, ScanRequest, Scores, scan, units
from spartan.kernels.units import Grid
from spartan.methods import DualAveraging, Magnitude, MaskingMethod, Spartan
from spartan.selection.soft import DualSearch, solve_all
from spartan.weights.patterns import Pattern, Unstructured

native = pytest.importorskip("spartan.kernels._native", reason="no native kernels here").Kernels
SETS = native.instruction_sets()

pytestmark = pytest.mark.filterwarnings("ignore:Nothing is kept")

floats = st.floats(allow_nan=False, allow_infinity=False, width=32)
tied = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-40, -1e-40, 3.4e38])
each_set = pytest.mark.parametrize("name", SETS)


def uneven(seed: int, count: int = 5) -> list[Tensor]:
    """Tensors of awkward sizes and scales, with zeros, ties and denormals among the entries."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for i in range(count):
        size = int(torch.randint(1, 40_000, (), generator=generator)) if i else 17
        x = torch.randn(size, generator=generator) * 10.0 ** (-i)
        x[:: 7 + i] = 0.0
        x[1 :: 11 + i] = -0.5
        x[2 :: 13 + i] = 1e-41
        tensors.append(x)
    return tensors


@each_set
@settings(deadline=None, max_examples=80)
@given(st.lists(st.lists(floats | tied, min_size=1, max_size=70), min_size=1, max_size=4),
       st.floats(0, 1), st.booleans(),
       st.sampled_from([[1.0] * 4, [1.0, 0.5, 3.0, 0.1]]))  # fmt: skip
def test_cuts_are_the_same(
    name: str, parts: list[list[float]], fraction: float, absolute: bool, costs: list[float]
) -> None:
    tensors = [torch.tensor(part, dtype=torch.float32) for part in parts]
    costs = costs[: len(parts)]
    # A power of two loses nothing, so that scores of 3.4e38 stay finite.
    scores = Scores(tensors, [0.5] * len(parts), costs, absolute)
    request = ScanRequest(scores, fraction * scores.total)
    with kernels.using("torch"):
        expected = scan([request])[0].cutoff
    with kernels.using(name):
        assert scan([request])[0].cutoff == expected


@each_set
@pytest.mark.parametrize("absolute", [True, False])
def test_any_bracket_gives_the_same_cut(name: str, absolute: bool) -> None:
    tensors = uneven(0)
    scores = Scores(tensors, [1.0, 0.3, 1.0, 7.0, 1.0], [1.0, 2.0, 1.0, 1.0, 0.25], absolute)
    for fraction in (0.001, 0.05, 0.5, 0.95):
        budget = fraction * scores.total
        with kernels.using("torch"):
            expected = scan([ScanRequest(scores, budget)])[0].cutoff
        t = expected.threshold
        for low, high in [(0, 0), (t, t), (t - 1e-3, t + 1e-3), (t - 9, t + 9), (t + 1, t + 2),
                          (t - 2, t - 1), (-1e38, 1e38)]:  # fmt: skip
            with kernels.using(name):
                assert scan([ScanRequest(scores, budget, (low, high))])[0].cutoff == expected


@pytest.mark.parametrize("value", [0.0, 1e-42, 0.01, -3.0])
@each_set
def test_ties_everywhere_are_taken_by_position(name: str, value: float) -> None:
    values = torch.full((300, 1001), value)
    with kernels.using(name):
        mask = hard_topk(values, 123_457)
    assert int(mask.sum()) == 123_457
    assert bool(mask.flatten()[:123_457].all())


@each_set
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.floats(0.01, 0.99), st.sampled_from([1.0, 30.0, 1e4]))
@example(230, 0.8065002366474626, 1e4)  # thousands of ties that are almost 1
def test_soft_masks_agree_to_1e_6(name: str, seed: int, density: float, beta: float) -> None:
    tensors = uneven(seed, 3)
    scores = Scores(tensors, [1.0, 0.7, 1.0], [1.0, 0.5, 1.0], absolute=True)
    budget = density * scores.total
    masks = {}
    for backend in ("torch", name):
        with kernels.using(backend):
            threshold = scan([ScanRequest(scores, budget)])[0].cutoff.threshold
            search = DualSearch(scores, budget, beta, threshold * 1.001, 0.1)
            solve_all([search])
        shown = [x.clone() for x in tensors]
        everything = [torch.ones(x.shape, dtype=torch.bool) for x in tensors]
        with kernels.using(backend):
            duals = [search.dual] * 3
            kernels.project(tensors, [], shown, everything, list(scores.scales), None, duals)
        # w = θ m shows m where θ is not tiny.
        masks[backend] = [
            torch.where(x.abs() > 1e-30, w / x, search.dual.mask(scores.of(x, i)))
            for i, (x, w) in enumerate(zip(tensors, shown, strict=True))
        ]
        mass = sum(
            float(m.double().sum()) * c for m, c in zip(masks[backend], scores.costs, strict=True)
        )
        assert abs(mass - budget) <= 1e-5 * budget + 1e-3
    for expected, mask in zip(masks["torch"], masks[name], strict=True):
        # The search leaves 1e-6; w = θ m and w / θ round once each.
        bound = 1e-6 + 2 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(mask, expected, rtol=0, atol=bound)


def projected(soft: bool, cut: bool, latent: bool) -> dict[str, list[Tensor]]:
    thetas = uneven(3)
    scales = [1.0, 0.5, 1.0, 2.0, 1.0]
    duals = [Dual(40.0, 0.5, 0.3 * i) for i in range(5)] if soft else None
    cuts = [(0.25, 0), (0.25, 11), (0.5, 10**6), (1e-3, 20_000), (0.0, 5)] if cut else None
    masks = [torch.arange(x.numel()) % 3 == 0 for x in thetas]
    weights = [x.clone() for x in thetas]
    latents = [torch.zeros_like(x) for x in thetas] if latent else []
    # As in training: θ is in the tensors that w is written to.
    kernels.project(weights, latents, weights, masks, scales, cuts, duals)
    return {"weights": weights, "latents": latents, "masks": masks, "thetas": thetas}


@each_set
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("cut", [True, False])
def test_projections_agree(name: str, soft: bool, cut: bool) -> None:
    with kernels.using("torch"):
        expected = projected(soft, cut, latent=True)
    with kernels.using(name):
        found = projected(soft, cut, latent=True)
        bare = projected(soft, cut, latent=False)
    for i, theta in enumerate(expected["thetas"]):
        assert torch.equal(found["latents"][i], theta)
        assert torch.equal(found["masks"][i], expected["masks"][i])
        assert torch.equal(bare["weights"][i], found["weights"][i])
        assert not bool(torch.signbit(found["weights"][i])[~found["masks"][i]].any())
        bound = (1e-6 if soft else 0.0) * theta.abs()
        assert bool(((found["weights"][i] - expected["weights"][i]).abs() <= bound).all())


@each_set
def test_gradients_agree(name: str) -> None:
    thetas = uneven(5)
    costs, scales = [1.0, 2.0, 0.5, 1.0, 1.0], [1.0, 0.5, 2.0, 1.0, 1.0]
    duals = [Dual(20.0, 0.4, 0.1), *[Dual(15.0, 0.5, 0.0)] * 4]
    results = []
    for backend in ("torch", name):
        grads = [torch.cos(torch.arange(x.numel()) * 1.0) for x in thetas]
        with kernels.using(backend):
            kernels.pull_back(grads, thetas, scales, costs, duals)
        results.append(grads)
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@each_set
def test_broken_numbers_are_found_wherever_they_are(name: str) -> None:
    tensors = uneven(1)
    with kernels.using(name):
        assert kernels.finite(tensors) == [True] * 5
        for position in (0, 3, -1):
            for bad in (torch.nan, torch.inf, -torch.inf):
                broken = [x.clone() for x in tensors]
                broken[2][position] = bad
                assert kernels.finite(broken) == [True, True, False, True, True]
                scores = Scores(broken, [1.0] * 5, [1.0] * 5, absolute=True)
                assert not scan([ScanRequest(scores, 100.0)])[0].finite


def train(method: MaskingMethod, pattern: Pattern, allocation: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ConvTranspose2d(8, 16, 3), nn.Linear(64, 32))
    # Not Adam, which makes a whole step of the rounding of a gradient that vanishes.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    budget = Budget(density=0.5, allocation=allocation)
    sparsifier = Sparsifier(model, optimizer, method, budget, 12, pattern=pattern)
    for step in range(10):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.sin(torch.arange(p.numel()) * (i + step + 1.0)).view_as(p) * 0.1
        optimizer.step()
    return {s.name: s.mask.clone() for s in sparsifier.weights} | {
        f"{s.name} w": s.prunable.parameter.detach().clone() for s in sparsifier.weights
    }


@pytest.mark.parametrize("method", [Spartan(), DualAveraging(backward_density=0.6), Magnitude()])
@pytest.mark.parametrize("pattern", [Unstructured(), Block(4, 8), Channel(), NM(2, 4)], ids=str)
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_training_is_the_same(method: MaskingMethod, pattern: Pattern, allocation: str) -> None:
    with kernels.using("torch"):
        expected = train(method, pattern, allocation)
    with kernels.using("native"):
        found = train(method, pattern, allocation)
    for key, tensor in expected.items():
        if tensor.dtype == torch.bool:
            assert torch.equal(found[key], tensor)
        else:
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5)


UNITS = [
    Grid((12, 40, 1), (4, 8, 1), (5, 1, 1)),
    Grid((6, 10, 9), (3, 5, 1), (18, 9, 1)),
    Grid((300, 7, 9), (1, 7, 9), (1, 0, 0)),
    Grid((50, 30, 4), (50, 1, 4), (0, 1, 0)),
    Grid((10, 6, 9), (5, 3, 1), (9, 18, 1)),
    Grid((20, 8, 9), (1, 1, 1), (72, 1, 8)),
]


@each_set
@pytest.mark.parametrize("grid", UNITS, ids=lambda grid: "x".join(map(str, grid.block)))
def test_units_agree(name: str, grid: Grid) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(grid.shape, generator=generator)
    y = torch.randn(grid.shape, generator=generator)
    x[::2, 1::3] = 0.0
    count = math.prod(grid.units)
    m, term = torch.rand(2, count, generator=generator)
    m[::3] = 0.0
    results = []
    for backend in ("torch", name):
        weight, grad, latent = x.clone(), y.clone(), torch.empty_like(x)
        with kernels.using(backend):
            pooled = units.pool_magnitudes(x, grid, (count,))
            products = units.pool_products(x, y, grid, (count,))
            units.pull_back_units(grad, x, m, term, grid)
            units.scale(weight, m, latent, weight, grid)
        assert torch.equal(latent, x)
        assert not bool(torch.signbit(weight[weight == 0]).any())
        results.append((pooled, weight, grad, products))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][1], x * units.spread(m, grid, grid.shape))


@pytest.mark.parametrize("make", [
    lambda: torch.randn(40, 30, dtype=torch.float64),
    lambda: torch.randn(40, 30, dtype=torch.bfloat16),
    lambda: torch.randn(30, 40).t(),
], ids=["double", "bfloat16", "strided"])  # fmt: skip
def test_what_the_native_kernels_do_not_serve_falls_to_torch(make: Callable[[], Tensor]) -> None:
    values = make()
    assert int(hard_topk(values, 100).sum()) == 100
    assert kernels.finite([values]) == [True]


@pytest.mark.parametrize("method", [Spartan(), DualAveraging(backward_density=0.6), Magnitude()])
def test_channels_last_weights_are_served_too(
    method: MaskingMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = []
    original = native.project
    monkeypatch.setattr(native, "project", lambda **named: served.append(1) or original(**named))
    results = []
    for backend in ("torch", "native"):
        torch.manual_seed(0)
        model = nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with kernels.using(backend):
            sparsifier = Sparsifier(model, optimizer, method, Budget(density=0.3), 12)
            for step in range(12):
                x = torch.sin(torch.arange(2 * 16 * 64.0) + step).view(2, 16, 8, 8)
                model(x.contiguous(memory_format=torch.channels_last)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert sparsifier.weights[0].mask.stride() == model.weight.stride()
        sparsifier.finalize()
        assert int(model.weight.count_nonzero()) == round(0.3 * model.weight.numel())
        results.append(model.weight.detach())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)
    assert len(served) > 12


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_ties_of_channels_last_tensors_are_taken_in_the_order_of_memory(backend: str) -> None:
    values = torch.full((4, 3, 5, 5), 0.1).contiguous(memory_format=torch.channels_last)
    scores = Scores([values], [1.0], [1.0], absolute=True)
    with kernels.using(backend):
        (mask,) = kernels.masks_of(scores, scan([ScanRequest(scores, 70.0)])[0].cutoff)
    assert mask.stride() == values.stride()
    assert mask.permute(0, 2, 3, 1).flatten().nonzero().flatten().tolist() == list(range(70))


def test_strided_weights_are_projected_as_any_other() -> None:
    base = torch.randn(60, 40)
    theta, mask = base.clone().t(), torch.rand(40, 60) < 0.5
    assert not theta.is_contiguous()
    with kernels.using("native"):
        kernels.project([theta], [], [theta], [mask], [1.0], None, None)
    assert torch.equal(theta, torch.where(mask, base.t(), 0.0))


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    tensors = uneven(7)
    scores = Scores(tensors, [1.0] * 5, [1.0] * 5, absolute=True)
    results: list[Any] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with kernels.using("native"):
                results.append(kernels.masses([(scores, Dual(30.0, 0.2, 0.1), False)])[0])
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    x, grid = torch.randn(32, 32, 1), Grid((32, 32, 1), (4, 4, 1), (8, 1, 1))
    expected = units.pool_magnitudes(x, grid, (8, 8))
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(units.pool_magnitudes(x, grid, (8, 8)), expected)
    finally:
        torch.set_default_dtype(torch.float32)
