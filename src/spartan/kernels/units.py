"""Pruning units of several weights: pooling weights over units, spreading values back.

Sums are taken in double precision and rounded to a float once, so that the order of summation
practically never shows: scores, and with them masks, come out the same from both versions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spartan.kernels.dispatch import native_for
from spartan.kernels.scores import chunk_size, wide


@dataclass(frozen=True)
class Grid:
    """A contiguous weight seen as (A, B, K), cut into units of (a, b, k) weights.

    Attributes:
        shape: (A, B, K).
        block: (a, b, k); divides the shape.
        strides: How far the values of units that are neighbours along A, B and K lie apart in the
            tensor of units.
    """

    shape: tuple[int, int, int]
    block: tuple[int, int, int]
    strides: tuple[int, int, int]

    @property
    def units(self) -> tuple[int, int, int]:
        """Number of units along A, B and K."""
        a, b, k = (n // size for n, size in zip(self.shape, self.block, strict=True))
        return a, b, k

    @property
    def count(self) -> int:
        """Number of units."""
        return math.prod(self.units)

    def transposed(self) -> Grid:
        """Exchange A and B."""

        def swap(x: tuple[int, int, int]) -> tuple[int, int, int]:
            return x[1], x[0], x[2]

        return Grid(swap(self.shape), swap(self.block), swap(self.strides))

    def repeated(self, times: int) -> Grid:
        """Stack a matrix of this division so many times, its units one after the other."""
        (a, b, _), (rows, columns, _), (down, right, _) = self.shape, self.block, self.strides
        return Grid((times, a, b), (1, rows, columns), (self.count, down, right))

    def numbers(self) -> list[int]:
        """Return everything in one list."""
        return [*self.shape, *self.block, *self.strides]


def pool_magnitudes(x: Tensor, grid: Grid, unit_shape: Sequence[int]) -> Tensor:
    """Sum |x| over each unit; returns `unit_shape`, in float32 or float64."""
    native = native_for([x]) if x.is_contiguous() else None
    if native is None:
        return _collect(torch.abs, grid, unit_shape, x)
    units = x.new_empty(tuple(unit_shape))
    threads = torch.get_num_threads()
    native.pool_units(grid=grid.numbers(), x=x, y=None, units=units, threads=threads)
    return units


def pool_products(x: Tensor, y: Tensor, grid: Grid, unit_shape: Sequence[int]) -> Tensor:
    """Sum x · y over each unit; returns `unit_shape`, in float32 or float64."""
    native = native_for([x], [y]) if x.is_contiguous() else None
    if native is None:
        return _collect(torch.mul, grid, unit_shape, x, y)
    units = x.new_empty(tuple(unit_shape))
    threads = torch.get_num_threads()
    native.pool_units(grid=grid.numbers(), x=x, y=y, units=units, threads=threads)
    return units


def spread(units: Tensor, grid: Grid, shape: Sequence[int]) -> Tensor:
    """Repeat the value of each unit over its weights; returns `shape`."""
    return _blocks_of(units, grid).expand(_split_shape(grid)).reshape(tuple(shape))


def scale(
    theta: Tensor, factors: Tensor, latent: Tensor | None, weight: Tensor, grid: Grid
) -> None:
    """Write `weight` ← θ times the factor of its unit, +0.0 for zeros, and `latent` ← θ.

    Args:
        theta: May be the tensor of `weight`.
        factors: One per unit.
        latent: None for no copy.
        weight: Written to.
        grid: Division into units.
    """
    copies = [] if latent is None else [latent]
    contiguous = all(x.is_contiguous() for x in (theta, weight, *copies, factors))
    native = native_for([theta, weight, *copies, factors]) if contiguous else None
    if native is not None and factors.numel() == grid.count:
        native.scale_by_units(
            grid=grid.numbers(),
            theta=theta,
            factors=factors,
            latent=latent,
            weight=weight,
            threads=torch.get_num_threads(),
        )
        torch.autograd.graph.increment_version(weight)
        return
    if not contiguous:
        product = (wide(theta) * spread(factors, grid, theta.shape)).add_(0.0)
        for copy in copies:
            copy.copy_(theta)
        weight.copy_(product)
        return
    for f, x, w, *parts in _bands(grid, [factors], [theta, weight, *copies]):
        product = (wide(x) * f).add_(0.0)
        for part in parts:
            part.copy_(x)
        w.copy_(product)


def pull_back_units(grad: Tensor, theta: Tensor, m: Tensor, terms: Tensor, grid: Grid) -> None:
    """Write g ← m g + sign(θ) term, with `m` and `terms` one per unit, in place."""
    contiguous = all(x.is_contiguous() for x in (grad, theta, m, terms))
    native = native_for([grad, theta, m, terms]) if contiguous else None
    if native is not None and m.numel() == terms.numel() == grid.count:
        native.pull_back_by_units(
            grid=grid.numbers(),
            grad=grad,
            theta=theta,
            m=m,
            terms=terms,
            threads=torch.get_num_threads(),
        )
        torch.autograd.graph.increment_version(grad)
        return
    if not contiguous:
        directed = wide(theta).sign() * spread(terms, grid, theta.shape)
        grad.copy_(directed.add_(spread(m, grid, theta.shape) * grad))
        return
    for mask, term, g, x in _bands(grid, [m, terms], [grad, theta]):
        g.copy_((wide(x).sign() * term).add_(mask * g))


def _split_shape(grid: Grid) -> tuple[int, ...]:
    return tuple(n for pair in zip(grid.units, grid.block, strict=True) for n in pair)


def _blocks_of(units: Tensor, grid: Grid) -> Tensor:
    """View unit values as (A / a, 1, B / b, 1, K / k, 1)."""
    a, b, k = grid.strides
    shape = [n for count in grid.units for n in (count, 1)]
    return units.contiguous().as_strided(shape, [a, 0, b, 0, k, 0])


def _collect(
    combine: Callable[..., Tensor], grid: Grid, unit_shape: Sequence[int], *tensors: Tensor
) -> Tensor:
    """Sum a combination of tensors over units, band by band."""
    tensors = tuple(x.contiguous() for x in tensors)
    dtype = wide(tensors[0][:0]).dtype
    units = torch.empty(tuple(unit_shape), dtype=dtype, device=tensors[0].device)
    for sums, *parts in _bands(grid, [units], tensors):
        terms = combine(*(wide(part) for part in parts))
        sums.copy_(terms.sum(dim=(1, 3, 5), keepdim=True, dtype=torch.float64))
    return units


def _bands(
    grid: Grid, unit_tensors: Sequence[Tensor], tensors: Sequence[Tensor]
) -> Iterator[list[Tensor]]:
    """Yield runs of rows of units: their unit values, and their weights block by block."""
    whole = [_blocks_of(u, grid) for u in unit_tensors]
    whole += [x.view(_split_shape(grid)) for x in tensors]
    row = grid.block[0] * grid.shape[1] * grid.shape[2]
    rows = max(1, chunk_size(tensors[0], math.prod(grid.shape)) // row)
    yield from map(list, zip(*(x.split(rows) for x in whole), strict=True))
