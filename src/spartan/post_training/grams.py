r"""Gram matrices X Xᵀ of calibration inputs, and the pruning problem of each layer.

For a layer Y = W X, with the dense weight W₀ on the dense network's inputs X₀ as the target and the
pruned network's inputs X as what it is to be computed from,

    H = X Xᵀ,   C = X₀ Xᵀ,   |W₀ X₀ - W X|² = tr(W H Wᵀ) - 2 tr(W₀ C Wᵀ) + |W₀ X₀|²
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from spartan.errors import CalibrationError
from spartan.example_inputs import run_on_copy
from spartan.post_training.matrices import Tiling, to_matrix
from spartan.post_training.weight_products import (
    ProductRecorder,
    WeightProduct,
    without_fused_attention,
)
from spartan.seeds import derive_seed
from spartan.weights.prunable import Prunable

# Positions of a layer's inputs that are looked at; of wide layers more. A Gram matrix's cost is
# linear in them, its sampling error falls with their root, and it is singular with fewer positions
# than inputs.
_POSITIONS = 32_768
_POSITIONS_PER_INPUT = 16
_FEWEST_TO_JUDGE = 32  # held-out positions of which one number is learned


@dataclass
class Reach:
    """How a pass over the calibration data reaches a weight.

    Attributes:
        positions: Columns of its inputs, over all batches.
        groups: Parts of its outputs that have inputs of their own.
        calls: Products with it in a pass over one batch, at most.
        other_uses: Operators that read it besides, in another way than as the matrix of a layer.
    """

    positions: int = 0
    groups: int = 1
    calls: int = 0
    other_uses: set[str] = field(default_factory=set)


@dataclass
class Gram:
    """Gram matrices of one layer, for each group of its outputs.

    Attributes:
        hessian: H, (groups, inputs, inputs), double precision, like all here.
        cross: C, of the same shape.
        target: |W₀ X₀|² of each output.
        positions: How many columns of X went in.
    """

    hessian: Tensor
    cross: Tensor
    target: Tensor
    positions: int = 0

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.hessian)


@dataclass
class LayerProblem:
    """One layer to prune.

    Attributes:
        weight: Its weight in the dense model.
        tiling: How the weight divides into units.
        dense: W₀ as a matrix, double precision.
        gram: What the calibration data say.
        damping: Weight of the pull towards W₀, a fraction of the mean of H's diagonal.
        held_out: What samples say that are not solved with; None if there are none.
    """

    weight: Prunable
    tiling: Tiling
    dense: Tensor
    gram: Gram
    damping: float
    held_out: Gram | None = None
    ridge: Tensor = field(init=False)  # the damping of each group

    def __post_init__(self) -> None:
        mean = self.gram.hessian.diagonal(dim1=1, dim2=2).mean(dim=1)
        # Inputs that are always zero say nothing: any pull will do.
        self.ridge = torch.where(mean > 0, self.damping * mean, 1.0)

    def grouped(self, matrix: Tensor) -> Tensor:
        """Return a matrix of all outputs as one for each group."""
        return matrix.reshape(self.gram.groups, -1, matrix.shape[-1])

    @property
    def damped(self) -> Tensor:
        """H + ridge, for each group."""
        eye = torch.eye(self.dense.shape[1], dtype=torch.float64, device=self.dense.device)
        return self.gram.hessian + self.ridge[:, None, None] * eye

    @cached_property
    def factor(self) -> Tensor:
        """Lower Cholesky factor of H + ridge, for each group."""
        factor: Tensor = torch.linalg.cholesky(self.damped)
        return factor

    @cached_property
    def share(self) -> float:
        """How much of C - H is believed, from 0 to 1: of what the change of the inputs asks for.

        With everything kept, the answer to it is W₀ + D, D = W₀ (C - H) (H + ridge)⁻¹; as much as
        held-out samples want of D.
        """
        asked = self.grouped(self.dense) @ (self.gram.cross - self.gram.hessian)
        change = torch.cholesky_solve(asked.mT, self.factor).mT.flatten(0, 1)
        return self.earned(self.dense, change)

    @property
    def pulled(self) -> Tensor:
        """W₀ C + ridge W₀: the right side of the normal equations W (H + ridge) = ….

        Where only a share s of the change of the inputs is believed, H + s (C - H) stands for C.
        """
        dense, gram = self.grouped(self.dense), self.gram
        cross = gram.hessian.lerp(gram.cross, self.share)
        return (dense @ cross + self.ridge[:, None, None] * dense).flatten(0, 1)

    def earned(self, matrix: Tensor, change: Tensor) -> float:
        """Return which share of a change of the weights fits the held-out samples best.

        With W + a D the error is a parabola in a; its minimum, in [0, 1], is the answer. Where such
        samples are too few to say so, the whole change is.
        """
        gram = self.held_out
        if gram is None or gram.positions < _FEWEST_TO_JUDGE:
            return 1.0
        w, d, dense = (self.grouped(m) for m in (matrix, change, self.dense))
        slope = float(((dense @ gram.cross - w @ gram.hessian) * d).sum())
        curvature = float((d @ gram.hessian * d).sum())
        return min(1.0, max(0.0, slope / curvature)) if curvature > 0 else 0.0

    def error(self, matrix: Tensor) -> float:
        """Return |W₀ X₀ - W X|² / |W₀ X₀|², NaN where the target is zero."""
        w, dense = self.grouped(matrix), self.grouped(self.dense)
        squared = (w @ self.gram.hessian * w).sum() - 2 * (dense @ self.gram.cross * w).sum()
        total = self.gram.target.sum()
        return float((squared + total).clamp(min=0) / total) if total > 0 else math.nan


def scout(
    model: nn.Module, batches: Sequence[Any], weights: Sequence[Prunable]
) -> dict[int, Reach]:
    """Find out which weights the calibration data reach, in the order in which they are reached.

    Raises:
        CalibrationError: The model does not run on the data.
    """
    found: dict[int, Reach] = {}
    bounds: dict[int, set[int]] = {}
    calls: dict[tuple[int, int], int] = {}

    def on_product(product: WeightProduct) -> None:
        if not bool(torch.isfinite(product.inputs).all()):
            raise CalibrationError(_not_finite(weights[product.index]))
        reach = found.setdefault(product.index, Reach())
        reach.positions += product.positions
        reach.groups = max(reach.groups, product.groups)
        bounds.setdefault(product.index, set()).update(product.outputs)
        part = product.index, product.outputs[0]
        calls[part] = calls.get(part, 0) + 1

    others: dict[int, set[str]] = {}
    for batch in batches:
        calls.clear()
        for index, names in record_products(model, [batch], weights, on_product).items():
            others.setdefault(index, set()).update(names)
        for (index, _), count in calls.items():
            found[index].calls = max(found[index].calls, count)
    for index, reach in found.items():
        if reach.groups == 1:
            reach.groups = weights[index].oriented_shape[0] // math.gcd(*bounds[index])
        reach.other_uses = others.get(index, set())
    return found


def _not_finite(weight: Prunable) -> str:
    return (
        f"The inputs of {weight.name!r} are NaN or infinite on the calibration data. Look for "
        "samples that are, or for a layer before it that overflows."
    )


def _too_large(weight: Prunable, largest: float) -> str:
    if not math.isfinite(largest):
        return _not_finite(weight)
    return (
        f"The inputs of {weight.name!r} reach {largest:.1e} on the calibration data, and their "
        "squares overflow. Give samples scaled as those that the model was trained on, or use "
        "method='fcpts', which squares no inputs."
    )


def record_products(
    model: nn.Module,
    batches: Sequence[Any],
    weights: Sequence[Prunable],
    on_product: Callable[[WeightProduct], None],
) -> dict[int, set[str]]:
    """Run a model on batches, and tell of every product that reads one of the weights.

    Returns:
        The operators that read a weight in another way, by its index.

    Raises:
        CalibrationError: The model does not run on the data.
    """
    recorder = ProductRecorder(weights, on_product)
    try:
        for batch in batches:
            with without_fused_attention(), torch.no_grad(), recorder:
                run_on_copy(model, batch)
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"The model does not run on the calibration data: {type(error).__name__}: {error}"
        ) from error
    return recorder.other_uses


class GramBuilder:
    """Adds up the Gram matrices of one layer, batch by batch.

    Args:
        weight: The layer's weight.
        dense: W₀ as it is in the dense model.
        reach: How the calibration data reach it.
        seed: Decides which positions are looked at.
    """

    def __init__(self, weight: Prunable, dense: Tensor, reach: Reach, seed: int) -> None:
        self.matrix = to_matrix(dense, weight)
        outputs, inputs = self.matrix.shape
        self.weight, self.reach = weight, reach
        self.share = min(1.0, max(_POSITIONS, _POSITIONS_PER_INPUT * inputs) / reach.positions)
        self.generator = torch.Generator().manual_seed(derive_seed(seed, weight.name, 0))
        options: Any = {"dtype": torch.float64, "device": dense.device}
        square = (reach.groups, inputs, inputs)
        self.gram = Gram(
            torch.zeros(square, **options),
            torch.zeros(square, **options),
            torch.zeros(outputs, **options),
        )

    def add(self, dense: WeightProduct, pruned: WeightProduct) -> None:
        """Add one product of the dense network and the same of the pruned one.

        Raises:
            CalibrationError: An input is NaN or infinite.
        """
        if pruned.positions != dense.positions:
            pruned = dense  # another choice of experts: their columns do not belong together
        count = dense.positions
        wanted = math.ceil(self.share * count)
        positions = torch.arange(count)
        if wanted < count:
            positions = torch.randperm(count, generator=self.generator)[:wanted].sort().values
        positions = positions.to(self.matrix.device)
        size = self.matrix.shape[0] // self.reach.groups
        groups = slice(dense.outputs[0] // size, dense.outputs[1] // size)
        matrix = self.matrix.unflatten(0, (self.reach.groups, size))[groups]
        same = dense is pruned
        pairs = zip(dense.columns(positions), pruned.columns(positions), strict=True)
        for ours, theirs in ((x, x) for x in dense.columns(positions)) if same else pairs:
            hessian = theirs @ theirs.mT
            if not bool(torch.isfinite(hessian).all()):
                raise CalibrationError(_too_large(self.weight, float(theirs.abs().max())))
            cross = hessian if same else ours @ theirs.mT
            self.gram.hessian[groups] += hessian
            self.gram.cross[groups] += cross
            outputs = (matrix.to(ours.dtype) @ ours).square().sum(dim=2)
            self.gram.target.view(self.reach.groups, size)[groups] += outputs
        self.gram.positions += wanted
