"""What is caught of a forward pass, and the Gram matrices made of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spartan.errors import CalibrationError
from spartan.post_training.grams import GramBuilder, scout
from spartan.post_training.layer_by_layer import LayerByLayer
from spartan.post_training.matrices import from_matrix, tiling_of, to_matrix
from spartan.post_training.weight_products import ProductRecorder, WeightProduct
from spartan.weights.patterns import NM, Block, Unstructured
from spartan.weights.prunable import find_prunable


class Conv1D(nn.Module):
    """Stores its weight as (in, out), as Hugging Face transformers do."""

    def __init__(self, nf: int, inputs: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(inputs, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.nf)


LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "linear on tokens": (nn.Linear(6, 4, bias=False), (3, 7, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, dilation=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 8, 7)),
    "conv2d, uneven kernel": (nn.Conv2d(3, 5, (1, 3), padding=(0, 1)), (2, 3, 6, 5)),
    "conv3d": (nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 3)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, stride=2), (2, 4, 7, 7)),
    "transposed": (
        nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
        (2, 3, 4, 4),
    ),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 4, dilation=2), (2, 3, 5)),
    "stored input first": (Conv1D(4, 6), (3, 7, 6)),
}


def caught(model: nn.Module, *inputs: Tensor) -> list[WeightProduct]:
    products: list[WeightProduct] = []
    with torch.no_grad(), ProductRecorder(find_prunable(model), products.append):
        model(*inputs)
    return products


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_a_matrix_times_what_is_caught(name: str) -> None:
    layer, shape = LAYERS[name]
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    x = torch.randn(shape)
    (product,) = caught(layer, x)
    (weight,) = find_prunable(layer)
    columns = torch.cat(list(product.columns(torch.arange(product.positions))), dim=2)
    matrix = to_matrix(weight.parameter.detach(), weight)
    ours = (matrix.unflatten(0, (product.groups, -1)) @ columns).flatten(0, 1)
    with torch.no_grad():
        wanted = layer(x)
    last = isinstance(layer, nn.Linear | Conv1D)
    wanted = wanted.flatten(0, -2).T if last else wanted.transpose(0, 1).flatten(1)
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("name", LAYERS)
def test_matrices_turn_back(name: str) -> None:
    (weight,) = find_prunable(LAYERS[name][0])
    tensor = torch.arange(weight.numel).view(weight.shape)
    assert torch.equal(from_matrix(to_matrix(tensor, weight), weight), tensor)


@pytest.mark.parametrize("pattern", [Unstructured(), Block(2, 3), Block(2, 1), NM(1, 3)], ids=str)
def test_a_tiling_is_the_pattern(pattern) -> None:
    conv = nn.Conv2d(6, 4, 3)
    (weight,) = find_prunable(conv)
    tiling = tiling_of(weight, pattern)
    if isinstance(pattern, NM):
        mask = tiling.largest(tiling.pool(to_matrix(weight.parameter.detach().abs(), weight)), 0)
        by_kernel = from_matrix(mask, weight).unflatten(1, (2, 3))
        assert (by_kernel.sum(dim=2) == 1).all()
        return
    units = torch.arange(tiling.count).view(tiling.units)
    spread = from_matrix(tiling.spread(units), weight)
    grid = pattern.spread(torch.arange(tiling.count).view(pattern.unit_shape(weight)), weight)
    # The same groups, whatever their names.
    pairs = {(int(a), int(b)) for a, b in zip(spread.flatten(), grid.flatten(), strict=True)}
    assert len(pairs) == tiling.count


@pytest.mark.parametrize("kdim", [None, 5])
def test_attention_is_caught(kdim: int | None) -> None:
    attention = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=True).eval()
    x, other = torch.randn(3, 4, 8), torch.randn(3, 6, kdim or 8)
    weights = find_prunable(attention)
    reach = scout(attention, [(x, other, other)], weights)
    assert len(reach) == len(weights)
    if kdim is None:
        fused = next(i for i, w in enumerate(weights) if "in_proj" in w.name)
        assert reach[fused].groups == 3  # the queries have other inputs than keys and values
        builder = GramBuilder(weights[fused], weights[fused].parameter.detach(), reach[fused], 0)
        for product in caught(attention, x, other, other):
            if product.index == fused:
                builder.add(product, product)
        queries, keys = x.flatten(0, 1).double(), other.flatten(0, 1).double()
        torch.testing.assert_close(
            builder.gram.hessian,
            torch.stack([queries.T @ queries, keys.T @ keys, keys.T @ keys]),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip


def test_functional_and_repeated_calls_are_caught() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.inner(x), self.inner.weight)

    net = Net()
    reach = scout(net, [torch.randn(5, 4), torch.randn(2, 4)], find_prunable(net))
    assert reach[0].calls == 2
    assert reach[0].positions == 2 * 7


def test_a_transposed_or_partial_use_is_not_taken_for_the_layer() -> None:
    layer = nn.Linear(4, 4)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.layer.weight + (x[:, :2] @ self.layer.weight[:, :2].T)

    assert caught(Net(), torch.randn(3, 4)) == []


def test_a_walk_shows_pruned_layers_to_the_next() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2)).eval()
    other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2)).eval()
    other.load_state_dict(net.state_dict())
    weights, targets = find_prunable(net), find_prunable(other)
    batches = [torch.randn(3, 4), torch.randn(2, 4)]
    seen = {}
    with LayerByLayer(net, other, batches, (weights, targets), [0, 1, 2]) as walk:
        for index, products in walk:
            seen[index] = [
                [p.gather(torch.arange(p.positions))[0] for p in pair] for pair in products
            ]
            if index == 0:
                with torch.no_grad():
                    targets[0].parameter.zero_()
    for (dense, pruned), x in zip(seen[1], batches, strict=True):
        torch.testing.assert_close(dense, net[:2](x).T)
        torch.testing.assert_close(pruned, other[:2](x).T)
        assert not torch.equal(dense, pruned)
    assert len(seen[2]) == 2


def test_a_walk_that_is_left_ends_its_threads() -> None:
    import threading

    before = set(threading.enumerate())
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    weights = find_prunable(net)
    with LayerByLayer(net, net, [torch.randn(2, 4)] * 3, (weights, weights), [0, 1]) as walk:
        next(iter(walk))
        assert len(set(threading.enumerate()) - before) == 6
    assert not set(threading.enumerate()) - before


def test_positions_are_drawn_where_there_are_too_many() -> None:
    conv = nn.Conv2d(1, 2, 1)
    weights = find_prunable(conv)
    batches = [torch.randn(4, 1, 100, 100) for _ in range(3)]
    reach = scout(conv, batches, weights)
    assert reach[0].positions == 120_000
    builder = GramBuilder(weights[0], weights[0].parameter.detach(), reach[0], seed=0)
    for x in batches:
        (product,) = caught(conv, x)
        builder.add(product, product)
    assert 30_000 < builder.gram.positions < 40_000
    mean = builder.gram.hessian.item() / builder.gram.positions
    assert mean == pytest.approx(1.0, abs=0.05)


def test_inputs_that_are_not_finite_name_the_layer() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    weights = find_prunable(net)
    reach = scout(net, [torch.ones(3, 2)], weights)
    builder = GramBuilder(weights[1], weights[1].parameter.detach(), reach[1], seed=0)
    product = caught(net, torch.full((3, 2), torch.nan))[1]
    with pytest.raises(CalibrationError, match=r"'1.weight' are NaN"):
        builder.add(product, product)
