"""`Budget`: a density, FLOP, byte or latency target, turned into kept units for each layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any

from torch import nn

from spartan.budgets.allocation import erk_densities, refuse_dead_layers, round_to_sum
from spartan.budgets.flops import trace_flops
from spartan.budgets.group_budget import GroupBudget, RowBudget, make_group_budget, with_floors
from spartan.budgets.packed_size import budget_of_bytes
from spartan.errors import BudgetError, did_you_mean, renamed
from spartan.weights.patterns import Pattern, check_fits
from spartan.weights.prunable import Prunable

COSTS = ("parameters", "flops", "bytes")
ALLOCATIONS = ("global", "uniform", "er", "erk")
COUNTS = ("prunable", "all")
# On an MLP of batch norms at 1 % dual averaging reaches 90 % with this, 73 % with a tenth and
# chance without floors (`benchmarks/dead_outputs.py`); half was no better than three tenths.
LAYER_FLOOR = 0.3


@dataclass(frozen=True)
class Budget:
    """How much of a model may stay.

    Attributes:
        density: Kept fraction, in (0, 1]. Give this or `sparsity`.
        sparsity: Removed fraction, in [0, 1); density = 1 - sparsity.
        cost: What a weight takes from the budget: `"parameters"`, `"flops"` (traced with
            `example_input`), `"bytes"` (the prunable weights in a packed file take at most density
            x their dense size; weights of less than a few kilobytes stay dense in the file and can
            exceed it), or a mapping from parameter name to cost per weight.
        allocation: How the budget spreads over layers: `"global"` (units compete across layers),
            `"uniform"` (the same density in each), `"er"` (Erdős-Rényi: density of a layer
            proportional to (inputs + outputs) / (inputs * outputs), a convolution seen as a matrix;
            Mocanu et al. 2018), `"erk"` (with kernels: to sum(shape) / prod(shape); Evci et al.
            2020, section 3), or a mapping from parameter or module name to density; layers it
            does not name get `density`.
        count: Which parameters the density refers to: the `"prunable"` ones, or `"all"` of the
            model (the prunable ones then carry the difference).
        example_input: One batch that the model can be run on, for `cost="flops"` and for
            `latency_ms` (of the size that is to take this time): a tensor, a tuple of positional or
            a dict of keyword arguments.
        latency_ms: Instead of a density: the time that the accelerated model is to take on this
            machine, with as many threads as torch uses now. What each weight costs is measured when
            the sparsifier is made.
        layer_floor: With the global allocation of a density: what each layer keeps at least, as a
            fraction of what it would keep at the same density as all others (and at most one unit
            for each of its outputs), so that no layer dies. Where that exceeds the budget, one
            unit each, or nothing where even that does. 0: no floors.
        sample_input: Deprecated name of `example_input`.

    The number of kept units is exactly round(density x units), halves to even, where all units cost
    the same, per layer for per-layer allocations (`"er"` and `"erk"` hit the total). Otherwise the
    kept cost is the largest greedy prefix that does not exceed density x total cost. Decimal
    densities are taken at their written value: 0.1 is one tenth, not the float nearest to it.

    Raises:
        BudgetError: A field is out of range or unknown.
    """

    density: float | None = None
    sparsity: float | None = None
    cost: str | Mapping[str, float] = "parameters"
    allocation: str | Mapping[str, float] = "global"
    count: str = "prunable"
    example_input: Any = None
    latency_ms: float | None = None
    layer_floor: float = LAYER_FLOOR
    sample_input: dataclasses.InitVar[Any] = None

    def __post_init__(self, sample_input: Any) -> None:
        if sample_input is not None:
            renamed("sample_input=", "example_input=")
            object.__setattr__(self, "example_input", sample_input)
        floor = self.layer_floor
        if isinstance(floor, bool) or not isinstance(floor, Real) or not 0 <= floor <= 1:
            raise BudgetError(f"layer_floor={self.layer_floor!r} must lie in [0, 1].")
        if self.latency_ms is not None:
            self._check_latency()
            return
        for name in ("density", "sparsity"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                raise BudgetError(f"{name}={value!r} must be a number between 0 and 1.")
        if self.density is not None and self.sparsity is not None:
            raise BudgetError("Give density or sparsity, not both.")
        per_layer = not isinstance(self.allocation, str)
        if self.density is None and self.sparsity is None and not per_layer:
            raise BudgetError("Give a density in (0, 1] or a sparsity in [0, 1).")
        if self.density is not None and not 0 < self.density <= 1:
            raise BudgetError(f"density={self.density} must lie in (0, 1].")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise BudgetError(f"sparsity={self.sparsity} must lie in [0, 1).")
        _check_name("cost", self.cost, COSTS)
        _check_name("allocation", self.allocation, ALLOCATIONS)
        _check_name("count", self.count, COUNTS)
        if self.cost == "flops" and self.example_input is None:
            raise BudgetError("cost='flops' needs example_input=, one batch to trace the model on.")
        if self.count == "all" and (self.cost != "parameters" or per_layer):
            raise BudgetError(
                "count='all' speaks of the model's parameters: it goes with cost='parameters' and "
                "a named allocation."
            )

    def _check_latency(self) -> None:
        alone = self.density is None and self.sparsity is None and self.cost == "parameters"
        spread = isinstance(self.allocation, str) and self.allocation in ("global", "uniform")
        if not (alone and spread and self.count == "prunable"):
            raise BudgetError(
                "latency_ms= is a budget of its own: density, sparsity, cost and count do not go "
                "with it, and it is allocated 'global' or 'uniform'."
            )
        number = self.latency_ms
        if not (isinstance(number, int | float) and 0 < number < math.inf):
            raise BudgetError(f"latency_ms={number!r} must be a positive number.")
        if self.example_input is None:
            raise BudgetError("latency_ms= needs example_input=, one batch to time the model on.")

    @property
    def fraction(self) -> Fraction | None:
        """The density as the exact value of the decimal that was written."""
        if self.density is not None:
            return Fraction(str(self.density))
        return None if self.sparsity is None else 1 - Fraction(str(self.sparsity))

    def plan(
        self, model: nn.Module, weights: Sequence[Prunable], pattern: Pattern
    ) -> list[GroupBudget]:
        """Divide the budget over groups of weights.

        Raises:
            BudgetError: The budget cannot be reached; the message says what can.
            PatternError: The pattern does not fit a weight.
        """
        check_fits(pattern, weights)
        units = [math.prod(pattern.unit_shape(w)) for w in weights]
        if self.latency_ms is not None:
            raise BudgetError(
                "A time has to be measured: spartan.deploy.latency.plan_latency divides it."
            )
        if self.cost == "bytes":
            return self._plan_bytes(model, weights, pattern, units)
        costs = [
            pattern.unit_numel(w) * cost
            for w, cost in zip(weights, self.costs_per_weight(model, weights), strict=True)
        ]
        if pattern.fixed_ratio is not None:
            return self._plan_rows(weights, pattern)
        if self.allocation == "global":
            density = self._density_of_prunable(model, weights)
            budget = make_group_budget(range(len(weights)), units, costs, density)
            if budget.kept == 0:
                raise BudgetError(
                    f"A density of {float(density):g} keeps none of {sum(units):,} units; the "
                    f"smallest reachable density is {1 / sum(units):.3g}."
                )
            return [with_floors(budget, weights, units, self.layer_floor)]
        if self.allocation in ("er", "erk"):
            return self._plan_erk(model, weights, units, costs)
        densities = self._densities(model, weights)
        budgets = [make_group_budget([i], units, costs, d) for i, d in enumerate(densities)]
        if isinstance(self.allocation, str):
            refuse_dead_layers(budgets, weights, units)
        return budgets

    def _plan_bytes(
        self, model: nn.Module, weights: Sequence[Prunable], pattern: Pattern, units: list[int]
    ) -> list[GroupBudget]:
        if pattern.fixed_ratio is not None or self.allocation in ("er", "erk"):
            raise BudgetError(
                "cost='bytes' goes with global, uniform or given allocations, and not with N:M "
                "patterns, whose size is fixed."
            )
        if self.allocation == "global":
            density = self._density_of_prunable(model, weights)
            shared = budget_of_bytes(range(len(weights)), weights, pattern, units, density)
            return [with_floors(shared, weights, units, self.layer_floor)]
        densities = self._densities(model, weights)
        return [budget_of_bytes([i], weights, pattern, units, d) for i, d in enumerate(densities)]

    def costs_per_weight(self, model: nn.Module, weights: Sequence[Prunable]) -> list[float]:
        """Return the cost of one entry of each weight."""
        if self.cost == "parameters":
            return [1.0] * len(weights)
        if self.cost == "flops":
            return trace_flops(model, weights, self.example_input)
        assert not isinstance(self.cost, str)
        named = _resolve(self.cost, weights, "cost")
        missing = [w.name for w, cost in zip(weights, named, strict=True) if cost is None]
        if missing:
            raise BudgetError(f"cost= gives no cost for {', '.join(map(repr, missing))}.")
        costs = [float(cost) for cost in named if cost is not None]
        for weight, cost in zip(weights, costs, strict=True):
            if not (math.isfinite(cost) and cost > 0):
                raise BudgetError(f"The cost of {weight.name!r} is {cost}; it must be positive.")
        return costs

    def _density_of_prunable(self, model: nn.Module, weights: Sequence[Prunable]) -> Fraction:
        density = self.fraction
        assert density is not None
        if self.count == "prunable":
            return density
        everything = sum(p.numel() for p in model.parameters())
        prunable = sum(w.parameter.numel() for w in weights)
        left = density * everything - (everything - prunable)
        if left <= 0:
            smallest = Fraction(everything - prunable + 1, everything)
            raise BudgetError(
                f"A density of {float(density):g} of all {everything:,} parameters cannot be "
                f"reached: {everything - prunable:,} of them are not prunable. The smallest "
                f"reachable density is {math.ceil(smallest * 10**6) / 10**6:g}."
            )
        return left / prunable

    def _densities(self, model: nn.Module, weights: Sequence[Prunable]) -> list[Fraction]:
        """Return one density per weight for uniform and given allocations."""
        if isinstance(self.allocation, str):
            return [self._density_of_prunable(model, weights)] * len(weights)
        densities = []
        for weight, given in zip(
            weights, _resolve(self.allocation, weights, "allocation"), strict=True
        ):
            density = self.fraction if given is None else Fraction(str(given))
            if density is None:
                raise BudgetError(
                    f"allocation= gives no density for {weight.name!r}; add it, or give density= "
                    "for the layers it does not name."
                )
            if not 0 <= density <= 1:
                raise BudgetError(f"The density of {weight.name!r} is {given}, outside [0, 1].")
            densities.append(density)
        return densities

    def _plan_erk(
        self, model: nn.Module, weights: Sequence[Prunable], units: list[int], costs: list[float]
    ) -> list[GroupBudget]:
        density = float(self._density_of_prunable(model, weights))
        totals = [n * cost for n, cost in zip(units, costs, strict=True)]
        shapes = [tuple(w.shape) for w in weights]
        if self.allocation == "er":
            oriented = [w.oriented_shape for w in weights]
            shapes = [(outputs, math.prod(inputs)) for outputs, *inputs in oriented]
        densities = erk_densities(shapes, density, totals)
        budgets = [
            make_group_budget([i], units, costs, Fraction(d)) for i, d in enumerate(densities)
        ]
        if len(set(costs)) == 1:
            wanted = round(self._density_of_prunable(model, weights) * sum(units))
            counts = round_to_sum([d * n for d, n in zip(densities, units, strict=True)], wanted)
            budgets = [
                GroupBudget(s.members, s.costs, s.total, k)
                for s, k in zip(budgets, counts, strict=True)
            ]
        refuse_dead_layers(budgets, weights, units)
        return budgets

    def _plan_rows(self, weights: Sequence[Prunable], pattern: Pattern) -> list[GroupBudget]:
        assert pattern.fixed_ratio is not None
        n, m = pattern.fixed_ratio
        wanted = Fraction(n, m)
        if isinstance(self.allocation, str):
            densities = [self.fraction]
        else:
            densities = [self.fraction, *(Fraction(str(d)) for d in self.allocation.values())]
        agree = all(d is None or abs(d - wanted) < 1e-9 for d in densities)
        if not agree or self.allocation in ("er", "erk") or self.count == "all":
            raise BudgetError(
                f"The pattern {pattern} keeps exactly {n} of every {m} weights in "
                f"every layer: ask for density={float(wanted):g} of the prunable weights, "
                "allocated 'global' or 'uniform', or choose another pattern."
            )
        return [RowBudget((i,), (1.0,), float(m), n) for i in range(len(weights))]


def as_budget(budget: Budget | float) -> Budget:
    """Return a budget as it is; a number is the density of one.

    Raises:
        BudgetError: It is neither.
    """
    if isinstance(budget, Budget):
        return budget
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise BudgetError(
            f"budget={budget!r} is neither a spartan.Budget nor a number: write "
            "budget=spartan.Budget(density=0.1), or budget=0.1 for the fraction of the weights "
            "to keep."
        )
    return Budget(density=budget)


def _check_name(field: str, value: object, known: Sequence[str]) -> None:
    if isinstance(value, str) and value not in known:
        raise BudgetError(f"Unknown {field} {value!r}; {did_you_mean(value, known)}")


def _resolve(
    values: Mapping[str, float], weights: Sequence[Prunable], field: str
) -> list[float | None]:
    """Look up each weight by its own name, then by its module's."""
    known = {w.name for w in weights} | {w.name.rpartition(".")[0] for w in weights}
    for name in values:
        if name not in known:
            raise BudgetError(f"{field}= names {name!r}; {did_you_mean(name, known - {''})}")
    return [values.get(w.name, values.get(w.name.rpartition(".")[0])) for w in weights]
