"""Sparsity patterns: how a weight divides into units that live or die together.

With a pattern, a weight-shaped tensor is pooled into one number per unit, and unit values are
spread back over the weight. Everything that selects or counts works on units; what else depends on
the pattern, the pattern declares (`tile`, `fixed_ratio`), so that a new one is one class here.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from spartan.errors import PatternError
from spartan.kernels import units
from spartan.kernels.units import Grid
from spartan.weights.prunable import Prunable


class Pattern(ABC):
    """A division of weights into units."""

    @abstractmethod
    def unit_shape(self, weight: Prunable) -> tuple[int, ...]:
        """Return the shape of a tensor with one entry per unit.

        Raises:
            PatternError: The pattern does not fit the weight; the message names it.
        """

    @abstractmethod
    def unit_numel(self, weight: Prunable) -> int:
        """Return the number of weights in each unit."""

    @abstractmethod
    def grid(self, weight: Prunable) -> Grid:
        """Return how the weight divides into units, and where their values lie."""

    def leaves_out(self, weight: Prunable) -> bool:
        """Say whether a weight is not prunable by default in this pattern."""
        return False

    def tile(self, weight: Prunable) -> tuple[int, int] | None:
        """Return (outputs, inputs) of a unit, if units are tiles at one kernel position each.

        Where they are not, None (the default), the pattern needs training: solvers of single layers
        (`spartan.post_training`) refuse it.
        """
        return None

    @property
    def fixed_ratio(self) -> tuple[int, int] | None:
        """(n, m) if the pattern itself says that n of every m neighbouring units stay.

        None, the default, leaves that to the budget.
        """
        return None

    def spread(self, values: Tensor, weight: Prunable) -> Tensor:
        """Repeat each unit's value over its weights; returns the weight's shape."""
        return units.spread(values, self.grid(weight), weight.shape)


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight is a unit."""

    def unit_shape(self, weight: Prunable) -> tuple[int, ...]:
        return tuple(weight.shape)

    def unit_numel(self, weight: Prunable) -> int:
        return 1

    def grid(self, weight: Prunable) -> Grid:
        return Grid((1, 1, weight.parameter.numel()), (1, 1, 1), (0, 0, 1))

    def tile(self, weight: Prunable) -> tuple[int, int] | None:
        return 1, 1

    def spread(self, values: Tensor, weight: Prunable) -> Tensor:
        return values

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of `rows` outputs × `cols` inputs; for convolutions, at one kernel position.

    Attributes:
        rows: Block size along the output dimension.
        cols: Block size along the input dimension (per group, for grouped convolutions).
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise PatternError(f"Block({self.rows}, {self.cols}): both sizes must be at least 1.")

    def unit_shape(self, weight: Prunable) -> tuple[int, ...]:
        _require_layout(weight)
        out, inputs, *kernel = weight.oriented_shape
        if out % self.rows or inputs % self.cols:
            raise PatternError(
                f"Blocks of {self.rows}x{self.cols} do not divide {weight.name!r} with {out} "
                f"outputs and {inputs} inputs; choose sizes that divide it, or exclude it."
            )
        units = (out // self.rows, inputs // self.cols, *kernel)
        return (weight.experts, *units) if weight.stacked else units

    def unit_numel(self, weight: Prunable) -> int:
        return self.rows * self.cols

    def grid(self, weight: Prunable) -> Grid:
        kernel = weight.kernel_numel
        inputs = weight.oriented_shape[1] // self.cols
        return _grid(weight, (self.rows, self.cols, 1), (inputs * kernel, kernel, 1))

    def tile(self, weight: Prunable) -> tuple[int, int] | None:
        return self.rows, self.cols

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.cols}"


@dataclass(frozen=True)
class NM(Pattern):
    """Exactly `n` of every `m` consecutive weights along the input dimension stay.

    Units are single weights, held as rows of `m`; each row has its own small budget.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise PatternError(f"NM({self.n}, {self.m}): 1 <= n <= m must hold.")

    def unit_shape(self, weight: Prunable) -> tuple[int, ...]:
        _require_layout(weight)
        inputs = weight.oriented_shape[1]
        if inputs % self.m:
            raise PatternError(
                f"{self.n}:{self.m} needs inputs in groups of {self.m}, but {weight.name!r} has "
                f"{inputs} inputs; choose another pattern, or exclude it."
            )
        return (weight.parameter.numel() // self.m, self.m)

    def unit_numel(self, weight: Prunable) -> int:
        return 1

    def grid(self, weight: Prunable) -> Grid:
        inputs, kernel = weight.oriented_shape[1], weight.kernel_numel
        return _grid(weight, (1, 1, 1), (inputs * kernel, 1, inputs))

    def tile(self, weight: Prunable) -> tuple[int, int] | None:
        return 1, 1

    @property
    def fixed_ratio(self) -> tuple[int, int] | None:
        return self.n, self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Channel(Pattern):
    """A unit is everything that computes one output: a row of a Linear, a filter of a conv.

    Of experts stacked in one parameter it is one row of one expert.

    Attributes:
        inputs: Instead, a unit is everything that reads one input: a column of a Linear, an input
            channel of all filters.
    """

    inputs: bool = False

    def leaves_out(self, weight: Prunable) -> bool:
        # Its channels are those of the layers before and behind it, and go with these.
        return weight.depthwise

    def unit_shape(self, weight: Prunable) -> tuple[int, ...]:
        _require_layout(weight)
        return (weight.experts * weight.oriented_shape[self.inputs],)

    def unit_numel(self, weight: Prunable) -> int:
        return weight.parameter.numel() // (weight.experts * weight.oriented_shape[self.inputs])

    def grid(self, weight: Prunable) -> Grid:
        out, inputs = weight.oriented_shape[:2]
        if self.inputs:
            return _grid(weight, (out, 1, weight.kernel_numel), (0, 1, 0))
        return _grid(weight, (1, inputs, weight.kernel_numel), (1, 0, 0))

    def __str__(self) -> str:
        return "input-channel" if self.inputs else "channel"


def _grid(weight: Prunable, block: tuple[int, int, int], strides: tuple[int, int, int]) -> Grid:
    """Turn a division of (out, in, kernel position) into one of the weight as stored."""
    out, inputs = weight.oriented_shape[:2]
    grid = Grid((out, inputs, weight.kernel_numel), block, strides)
    grid = grid.transposed() if weight.input_first else grid
    return grid.repeated(weight.experts) if weight.stacked else grid


def _require_layout(weight: Prunable) -> None:
    """Raise `PatternError` unless it is known which dimension of a weight is the inputs."""
    if not weight.layout_known:
        raise PatternError(
            f"It is not known which dimension of {weight.name!r} {tuple(weight.shape)} is the "
            f"inputs: say include=['{weight.name}:out,in'] where a product reads them from the "
            f"last one, as nn.Linear does, or ['{weight.name}:in,out']."
        )


def check_fits(pattern: Pattern, weights: Sequence[Prunable]) -> None:
    """Raise `PatternError` unless a pattern fits all weights; the message names those it does not.

    Args:
        pattern: The pattern.
        weights: The weights.
    """
    misfits: dict[str, PatternError] = {}
    for weight in weights:
        try:
            pattern.unit_shape(weight)
        except PatternError as error:
            misfits[weight.name] = error
    if len(misfits) > 1:
        raise PatternError(
            f"{pattern} does not fit {len(misfits)} of {len(weights)} weights: "
            f"{', '.join(map(repr, misfits))}. Choose another pattern, or exclude=[…] them. "
            f"The first: {next(iter(misfits.values()))}"
        )
    for misfit in misfits.values():
        raise misfit


def parse_pattern(text: str) -> Pattern:
    """Read a pattern from its short name.

    Args:
        text: `unstructured`, `channel`, `input-channel`, `block:ROWSxCOLS` or `N:M`, as
            `str(pattern)` writes it.

    Raises:
        PatternError: The text is none of these.
    """
    if text == "unstructured":
        return Unstructured()
    if text in ("channel", "input-channel"):
        return Channel(inputs=text == "input-channel")
    if match := re.fullmatch(r"block:(\d+)x(\d+)", text):
        return Block(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    raise PatternError(
        f"Unknown pattern {text!r}; write unstructured, channel, input-channel, "
        "block:ROWSxCOLS (block:16x16) or N:M (2:4)."
    )
