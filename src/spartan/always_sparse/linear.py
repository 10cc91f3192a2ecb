"""`SparseLinear`: a linear layer that stores only its nonzeros, in training too."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spartan.always_sparse.layer import SparseLayer, draw_connections
from spartan.kernels.connections import Connections


class SparseLinear(SparseLayer):
    """y = x Wᵀ + b with a W of which only single connections exist, ever.

    Takes the place of `nn.Linear`. Time and memory grow with the number of connections and of
    activations; nothing of the size in_features x out_features is allocated, at any time. The
    connections are those of a random graph, and `spartan.methods` such as `GSE` move them.

    Samples of a batch (batch, in_features) are neighbours in the memory of the result, as the next
    sparse layer wants them, and activations between keep it so (norms do not, and cost a copy).
    Inputs of more dimensions give contiguous results, as their surroundings want them.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        bias: Whether there is a bias.
        density: Connections as a fraction of all pairs: exactly round(density * pairs) are drawn.
        connections_per_unit: Instead: how many inputs an output unit has on average.
        connections: Instead: the graph itself.
        every_unit: Give every output unit at least one connection.
        device: Of values and bias.
        dtype: Of values and bias.

    Raises:
        BudgetError: Such a graph does not exist.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        density: float | None = None,
        connections_per_unit: float | None = None,
        connections: Connections | None = None,
        every_unit: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        drawn = draw_connections(
            out_features, in_features, density, connections_per_unit, connections, every_unit
        )
        super().__init__(out_features, in_features, drawn, bias, device, dtype)
        self.in_features = in_features
        self.out_features = out_features

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight, were it dense."""
        return (self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in_features) to (…, out_features)."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"The input has shape {tuple(x.shape)}; its last dimension must be in_features="
                f"{self.in_features}."
            )
        if x.dim() == 2:
            return self.multiply(x)
        rows = x.reshape(math.prod(x.shape[:-1]), self.in_features)
        y = self.multiply(rows).view(*x.shape[:-1], self.out_features)
        return y if rows.stride(0) == 1 else y.contiguous()

    def to_dense(self) -> nn.Linear:
        """Return an `nn.Linear` with the same weights, zeros included."""
        made = {"device": self.values.device, "dtype": self.values.dtype}
        dense: nn.Linear = nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, self.bias is not None, **made
        )
        self.copy_to(dense)
        return dense

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"{super().extra_repr()}"
        )
