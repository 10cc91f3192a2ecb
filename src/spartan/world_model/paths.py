r"""Path counts through gated attention layers, and the local causal graph they give.

    Ā = (A^L + I) ⋯ (A^2 + I)(A^1 + I)         layer 1 is the right-most factor

A^l_ij is 1 where token i reads token j in layer l, and I stands for the residual route. Ā_ij counts
the routes from token j to output i, so that j is a local causal parent of i where Ā_ij ≥ 1: a route
may pass through other tokens, and no single layer's adjacency is the graph. The last token is the
one of the intervention.

Source: Lei, Schölkopf, Posner, "SPARTAN: A Sparse Transformer World Model Attending to What
Matters", NeurIPS 2025 (arXiv 2411.06890), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rows = Literal["decoded", "all", "edges"]


@dataclass(frozen=True)
class Graph:
    """Local causal graphs, one for each state.

    Attributes:
        edges: Boolean `[states, N, N]`; row i, column j: object j influences the next state of
            object i. The diagonal is False: every object influences itself.
        targets: Boolean `[states, N]`: some route leads from the intervention to the object. Where
            it is False, the intervention has no influence through these gates.
        direct: Boolean `[states, N]`: the object itself reads the intervention's token in some
            layer; whom the intervention acts on, rather than on those who read of it.
    """

    edges: Tensor
    targets: Tensor
    direct: Tensor


def path_matrix(adjacency: Tensor) -> Tensor:
    """Return Ā, differentiable.

    Args:
        adjacency: A of each layer, `[L, …, n, n]`, floating, first layer first.

    Returns:
        `[…, n, n]`.
    """
    n = adjacency.shape[-1]
    paths = torch.eye(n, dtype=adjacency.dtype, device=adjacency.device)
    paths = paths.expand(adjacency.shape[1:])
    for layer in adjacency:
        paths = paths + layer @ paths
    return paths


def count_paths(adjacency: Tensor, rows: Rows = "decoded") -> Tensor:
    """Return |Ā|, the number of paths of each state, `[…]`, differentiable.

    Args:
        adjacency: A of each layer, `[L, …, n, n]`.
        rows: `"decoded"` counts those that end in objects; `"all"`, as published, also those that
            end in the intervention's token, from which nothing is predicted; `"edges"` only those
            between two objects.
    """
    paths = path_matrix(adjacency)
    if rows == "edges":
        between = paths[..., :-1, :-1]
        return between.sum((-2, -1)) - between.diagonal(dim1=-2, dim2=-1).sum(-1)
    ends = paths if rows == "all" else paths[..., :-1, :]
    return ends.sum((-2, -1))


def reachable(adjacency: Tensor) -> Tensor:
    """Return where Ā ≥ 1, boolean `[…, n, n]`, without rounding whatever the number of paths."""
    n = adjacency.shape[-1]
    found = torch.eye(n, dtype=torch.bool, device=adjacency.device).expand(adjacency.shape[1:])
    for layer in adjacency:
        found = found | (layer.float() @ found.float() > 0)
    return found


def read_graph(adjacency: Tensor) -> Graph:
    """Read local causal graphs from the gates.

    Args:
        adjacency: A of each layer, `[L, states, N + 1, N + 1]`, exactly 0 or 1.
    """
    found = reachable(adjacency)[..., :-1, :]
    edges, targets = found[..., :-1], found[..., -1]
    own = torch.eye(edges.shape[-1], dtype=torch.bool, device=edges.device)
    direct = (adjacency[..., :-1, -1] > 0).any(0)
    return Graph(edges & ~own, targets, direct)
