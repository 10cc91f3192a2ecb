"""What each growth method chooses, and how they meet where their settings do."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spartan import Budget, Sparsifier
from spartan.always_sparse import SparseLinear, to_dense
from spartan.always_sparse.product import Passes
from spartan.kernels.key_lists import is_in
from spartan.methods import DSTEE, GSE, RigL
from spartan.methods.growth.dst_ee import acquisition
from tests.conftest import VECTORS, batch, train_step
from tests.methods.test_growth_contract import sgd, sparse_net, sparsify

pytestmark = pytest.mark.filterwarnings("ignore:.*have no connection")


def one_layer(density: float = 0.1, samples: int = 16) -> tuple[Any, Tensor]:
    """Return a weight that has seen a pass, and its dense gradient."""
    torch.manual_seed(0)
    layer = SparseLinear(24, 18, density=density)
    budget = Budget(density=density)
    sparsifier = Sparsifier(layer, None, RigL(period=1, end=1.0), budget, 10)
    twin = layer.to_dense()
    x = torch.randn(samples, 24)
    layer(x).square().sum().backward()
    twin(x).square().sum().backward()
    return sparsifier.weights[0], twin.weight.grad


def test_with_all_candidates_gse_is_rigl_and_with_few_it_takes_them_all() -> None:
    weight, gradient = one_layer()
    (greedy,) = RigL().grow([weight], 10, 1)
    for sampler in ("uniform", "grabo"):
        (guided,) = GSE(sampler=sampler, gamma=2000.0).grow([weight], 10, 1)
        assert torch.equal(guided, greedy)
    outside = gradient.abs().flatten()
    outside[weight.connections.keys()] = -1
    assert greedy.tolist() == sorted(outside.topk(10).indices.tolist())
    few = GSE(gamma=0.1)
    assert torch.equal(few.grow([weight], 10**6, 1)[0], few.sample(weight, 1))
    assert len(few.sample(weight, 1)) <= math.ceil(0.1 * weight.connections.count)


def test_half_full_layers_are_not_sampled() -> None:
    weight, _ = one_layer(density=0.6)
    candidates = GSE(gamma=0.01).sample(weight, 1)
    assert len(candidates) == weight.unconnected
    assert not bool(is_in(candidates, weight.connections.keys()).any())


def test_bounds_and_sketches_of_the_gradient() -> None:
    weight, gradient = one_layer()
    f, g = GSE(sampler="grabo").distributions(weight, 1)
    assert bool((gradient.abs() <= torch.outer(g, f) * (1 + 1e-5)).all())
    single, exact = one_layer(samples=1)
    for sampler in ("grabo", "graest"):
        f, g = GSE(sampler=sampler).distributions(single, 1)
        torch.testing.assert_close(torch.outer(g, f).float(), exact.abs(), rtol=1e-4, atol=1e-5)
    # The signed sketch is unbiased: the mean over signs of (δ s)(h s)ᵀ is the gradient.
    ((h, delta),) = weight.passes
    total = torch.zeros_like(gradient)
    for draw in range(4000):
        s = torch.randint(2, (16,), generator=torch.Generator().manual_seed(draw)) * 2.0 - 1
        total += torch.outer(delta[0] @ s, h[0] @ s)
    error = (total / 4000 - gradient).norm() / gradient.norm()
    assert float(error) < 0.15
    f, g = GSE(sampler="graest").distributions(weight, 1)
    assert float(f.max()) <= float(h[0].abs().sum(1).max()) * (1 + 1e-5)


def test_uniform_samples_are_uniform_and_as_many_as_expected() -> None:
    torch.manual_seed(0)
    layer = SparseLinear(64, 64, density=0.05)
    weight = Sparsifier(layer, None, RigL(), Budget(density=0.05), 10).weights[0]
    hits, yields = torch.zeros(64 * 64), []
    for step in range(2000):
        sample = GSE().sample(weight, step)
        hits[sample] += 1
        yields.append(len(sample) / weight.connections.count)
    keys = weight.connections.keys()
    assert not bool(hits[keys].any())
    free = torch.ones(64 * 64, dtype=torch.bool)
    free[keys] = False
    mean = hits[free].mean()
    chi_square = ((hits[free] - mean).square() / mean).sum() / free.sum()
    assert float(chi_square) == pytest.approx(1.0, abs=0.12)
    # Share of the draws that is unique and not connected, at 95 % sparsity.
    assert sum(yields) / len(yields) == pytest.approx(0.93, abs=0.01)


def test_guided_samples_follow_their_distributions() -> None:
    weight, _ = one_layer(density=0.01)
    method = GSE(sampler="grabo", gamma=200.0)
    f, g = method.distributions(weight, 1)
    hits = torch.zeros(18, 24, dtype=torch.float64)
    for step in range(300):
        sample = GSE(sampler="grabo", gamma=5.0).sample(weight, step)
        hits.view(-1)[sample] += 1
    expected = torch.outer(g / g.sum(), f / f.sum())
    expected.view(-1)[weight.connections.keys()] = 0
    correlation = torch.corrcoef(torch.stack((hits.flatten(), expected.flatten())))[0, 1]
    assert float(correlation) > 0.9


def test_dead_layers_are_sampled_uniformly() -> None:
    weight, _ = one_layer()
    weight.module.passes = Passes()
    values = torch.zeros(weight.connections.count)
    weight.module.passes.add(torch.zeros(1, 24, 4), torch.zeros(1, 18, 4), values)
    weight.module.passes.finish()
    for sampler in ("grabo", "graest"):
        (grown,) = GSE(sampler=sampler).grow([weight], 5, 1)
        assert grown.numel() == 5


def test_greed_grows_with_gamma() -> None:
    weight, gradient = one_layer(density=0.05)
    flat = gradient.abs().flatten()

    def greed(gamma: float) -> float:
        picks = [GSE(gamma=gamma).grow([weight], 4, step)[0] for step in range(200)]
        return float(torch.stack([flat[p].mean() for p in picks]).mean())

    found = [greed(gamma) for gamma in (0.5, 1.0, 5.0, 50.0)]
    assert found == sorted(found)


def test_acquisition_of_dst_ee() -> None:
    vector = json.loads((VECTORS / "hardconcrete_vectors.json").read_text(encoding="utf-8"))
    case = vector["related_methods"]["dst_ee_growth"]
    gradient, rounds = torch.tensor(case["grad"]), torch.tensor(case["active_count_N"])
    score = acquisition(gradient, rounds, case["t"], case["c"], case["eps"])
    assert score.tolist() == pytest.approx(case["score"], rel=1e-6)
    free = torch.tensor(case["mask_after_drop"]) == 0
    assert int(torch.where(free, score, -1.0).argmax()) == case["grow_one"]
    assert int(torch.where(free, gradient, -1.0).argmax()) == case["rigl_would_grow"]


def test_exploration_covers_more() -> None:
    tried = []
    for c in (0.0, 1.0, 100.0):
        model = sparse_net()
        optimizer = sgd(model)
        sparsifier = sparsify(model, optimizer, DSTEE(period=1, end=1.0, exploration=c), steps=40)
        for step in range(40):
            train_step(model, optimizer, step % 4)
        tried.append(sparsifier.monitor()["tried"])
    assert tried == sorted(tried)
    assert tried[2] > 1.1 * tried[0]


def test_rounds_count_updates_that_found_a_connection() -> None:
    model = sparse_net()
    optimizer = sgd(model)
    sparsifier = sparsify(model, optimizer, DSTEE(period=2, end=1.0))
    counted: dict[str, dict[int, int]] = {weight.name: {} for weight in sparsifier.weights}
    for step in range(12):
        before = sparsifier.selected()
        train_step(model, optimizer, step)
        if sparsifier.moves_after(step + 1):
            for weight in sparsifier.weights:
                for key in before[weight.name].tolist():
                    counted[weight.name][key] = counted[weight.name].get(key, 0) + 1
    for weight in sparsifier.weights:
        rounds = dict(zip(weight.tried.tolist(), weight.rounds.tolist(), strict=True))
        assert {k: n for k, n in rounds.items() if n} == counted[weight.name]


def test_convolutions_have_the_gradient_of_dense_ones() -> None:
    model = sparse_net()
    sparsifier = sparsify(model, None, RigL(period=1, end=1.0))
    twin = to_dense(copy.deepcopy(model))
    x, y = batch(0)
    for net in (model, twin):
        nn.functional.cross_entropy(net(x), y).backward()
    for weight in sparsifier.weights:
        dense = twin.get_submodule(weight.name.removesuffix(".values")).weight.grad.flatten()
        found = weight.gradient(torch.arange(dense.numel()))
        torch.testing.assert_close(found, dense, rtol=1e-3, atol=1e-6)
