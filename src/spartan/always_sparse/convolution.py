"""`SparseConv2d`: a 2-D convolution that stores only its nonzeros, in training too."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spartan.always_sparse.layer import SparseLayer, draw_connections
from spartan.errors import SpartanError
from spartan.kernels.connections import Connections

_Pair = tuple[int, int]


class SparseConv2d(SparseLayer):
    """A 2-D convolution of whose filters only single connections exist.

    Takes the place of `nn.Conv2d` with one group and zero padding. The input is unfolded to
    patches, and the filters are a matrix out_channels x (in_channels · kernel rows · kernel
    columns) as in `SparseLinear`; the patches take as many times the memory of the input as a
    kernel has positions.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the result.
        kernel_size: Rows and columns of a kernel.
        stride: As in `nn.Conv2d`.
        padding: As in `nn.Conv2d`, in numbers.
        dilation: As in `nn.Conv2d`.
        bias: Whether there is a bias.
        density: Connections as a fraction of all weights: exactly round(density * weights).
        connections_per_unit: Instead: how many an output channel has on average.
        connections: Instead: the graph itself.
        every_unit: Give every output channel at least one connection.
        device: Of values and bias.
        dtype: Of values and bias.

    Raises:
        BudgetError: Such a graph does not exist.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | _Pair,
        stride: int | _Pair = 1,
        padding: int | _Pair = 0,
        dilation: int | _Pair = 1,
        bias: bool = True,
        *,
        density: float | None = None,
        connections_per_unit: float | None = None,
        connections: Connections | None = None,
        every_unit: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kernel = pair(kernel_size)
        inputs = in_channels * math.prod(kernel)
        drawn = draw_connections(
            out_channels, inputs, density, connections_per_unit, connections, every_unit
        )
        super().__init__(out_channels, inputs, drawn, bias, device, dtype)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel
        self.stride = pair(stride)
        self.padding = pair(padding)
        self.dilation = pair(dilation)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight, were it dense."""
        return (self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (images, in_channels, rows, columns), or one image, to the convolved images."""
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise RuntimeError(
                f"The input has shape {tuple(x.shape)}; images of in_channels={self.in_channels} "
                "are needed."
            )
        images = x if x.dim() == 4 else x[None]
        rows, columns = (self._size(images.shape[2 + axis], axis) for axis in (0, 1))
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            patches = images[:, :, :: self.stride[0], :: self.stride[1]].flatten(2)
        else:
            geometry = (self.kernel_size, self.dilation, self.padding, self.stride)
            patches = F.unfold(images, *geometry)
        y = self.multiply(patches).view(len(images), self.out_channels, rows, columns)
        return y if x.dim() == 4 else y[0]

    def _size(self, size: int, axis: int) -> int:
        reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
        return (size + 2 * self.padding[axis] - reach - 1) // self.stride[axis] + 1

    def to_dense(self) -> nn.Conv2d:
        """Return an `nn.Conv2d` with the same weights, zeros included."""
        dense: nn.Conv2d = nn.utils.skip_init(
            nn.Conv2d,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            device=self.values.device,
            dtype=self.values.dtype,
        )
        self.copy_to(dense)
        return dense

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"{super().extra_repr()}"
        )


def pair(value: int | Sequence[int]) -> _Pair:
    """Return a number twice, or the two numbers that are given."""
    if isinstance(value, str):
        raise SpartanError(f"A convolution takes numbers, not {value!r}, for its padding.")
    if isinstance(value, Sequence):
        first, second = value
        return operator.index(first), operator.index(second)
    return operator.index(value), operator.index(value)
