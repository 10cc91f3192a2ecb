"""Paths through gates, against every route counted by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spartan.world_model import count_paths, path_matrix, reachable, read_graph


@st.composite
def adjacencies(draw: st.DrawFn) -> Tensor:
    layers, n = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    bits = draw(st.lists(st.booleans(), min_size=layers * n * n, max_size=layers * n * n))
    return torch.tensor(bits).float().view(layers, 1, n, n)


def routes(adjacency: Tensor, i: int, j: int) -> int:
    """Count the sequences of tokens from j to i, one step a layer, by gate or by residual."""
    layers, _, n, _ = adjacency.shape
    count = 0
    for between in itertools.product(range(n), repeat=layers - 1):
        stops = (j, *between, i)
        ways = 1
        for layer in range(layers):
            sender, receiver = stops[layer], stops[layer + 1]
            ways *= int(adjacency[layer, 0, receiver, sender]) + (sender == receiver)
        count += ways
    return count


@given(adjacency=adjacencies())
def test_path_matrix_counts_every_route(adjacency: Tensor) -> None:
    found, n = path_matrix(adjacency)[0], adjacency.shape[-1]
    expected = [[routes(adjacency, i, j) for j in range(n)] for i in range(n)]
    assert found.tolist() == expected
    assert torch.equal(reachable(adjacency)[0], torch.tensor(expected) > 0)
    assert float(count_paths(adjacency, "all")) == sum(map(sum, expected))
    assert float(count_paths(adjacency)) == sum(map(sum, expected[:-1]))


def test_order_of_layers_matters() -> None:
    first, second = torch.zeros(3, 3), torch.zeros(3, 3)
    first[1, 2] = 1  # 2 is read by 1 in the first layer, 1 by 0 in the second: a route 2 → 0
    second[0, 1] = 1
    adjacency = torch.stack((first, second)).unsqueeze(1)
    assert reachable(adjacency)[0, 0, 2]
    assert not reachable(adjacency.flip(0))[0, 0, 2]


@pytest.mark.parametrize(("layers", "n"), [(1, 3), (2, 5), (3, 4)])
def test_totals(layers: int, n: int) -> None:
    everything = torch.ones(layers, 2, n, n)
    assert count_paths(everything, "all").tolist() == [n * (n + 1) ** layers] * 2
    nothing = torch.zeros(layers, 2, n, n)
    assert count_paths(nothing, "all").tolist() == [n, n]
    assert torch.equal(path_matrix(nothing)[0], torch.eye(n))


@given(adjacency=adjacencies())
def test_direct_targets_are_targets(adjacency: Tensor) -> None:
    graph = read_graph(adjacency)
    assert not bool((graph.direct & ~graph.targets).any())
    assert not bool(graph.edges.diagonal(dim1=-2, dim2=-1).any())
