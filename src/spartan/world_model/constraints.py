r"""Error and edge budgets of a world model, and the Lagrangian loss of each.

    error budget (as published)     min E|Ā|        s.t.  E MSE ≤ τ        L = (MSE - τ) + |Ā| / λ
    edge budget                     min E MSE       s.t.  E edges ≤ k      L = MSE + λ Σ_i≠j Ā_ij

with i, j objects in the second: routes from the intervention are no edges. In both, λ follows the
relative violation, on a moving average (`multipliers.Multiplicative`); the weight of the paths is
1/λ in the first, and λ in the second. It starts at its smallest, and at first paths cost nothing:
before the dynamics are known no path is of use, the least cost closes all of them, and they hardly
open again. An error budget begins to press when the error has come within twice what is allowed.

Both budgets are narrowed while the model learns: τ is higher by what large steps cost and falls
with them, or the price of paths would stay at its smallest until the very end; and k shrinks from
all edges to what is allowed, as a cube.

Source: Lei, Schölkopf, Posner, arXiv 2411.06890, section 4 and appendix A.2, after Rezende, Viola,
"Taming VAEs", 2018. The edge budget is our own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spartan.errors import WorldError
from spartan.multipliers import Multiplicative
from spartan.world_model.paths import Rows, count_paths, read_graph


@dataclass(frozen=True)
class Settings:
    """What was tuned, and what chose it.

    All were tuned together, on the worlds of `benchmarks/world_model.py`. No figures of those
    trials were kept: values used before are named, and beside each is said what it is for.

    Attributes:
        least_path_weight: 1/λ of an error budget at the start, and at least, in parts of the error
            of predicting no change, which is about 1. So little that no path that is of use closes
            while the error is above what is allowed (1e-3 before gates became sharper).
        most_path_weight: 1/λ at most. Gates that are closed at any price stay closed; 0.5, and
            then 0.1, were used before.
        least_edge_weight: λ of an edge budget at the start, and at least, in parts of one object's
            share of the error.
        most_edge_weight: λ at most, in the same parts; the ceiling of `most_path_weight`, for
            budgets of far fewer edges than there are true ones.
        cheaper: Step of ln λ by which paths get cheaper while an error budget is exceeded.
        dearer: Step by which they get dearer while it is met. A quarter of `cheaper`: gates follow
            the price late, and a price that runs ahead of them closes all. (Both were 0.02.)
        edges_cheaper: Step by which edges get cheaper while an edge budget is met. Edges are
            counted with little noise; what falls below its limit is to be let go at once.
        edges_dearer: Step by which they get dearer while it is exceeded; slow, as `dearer` is.
        edges_smoothing: Of the moving average of an edge budget's violation: about ten batches.
        near: Multiple of the error allowed at the time below which paths begin to cost anything.
            Before, the dynamics are not known, and the least cost closes every path.
        raised: By what the error allowed is raised while steps are large: about what large steps
            cost the error of a model that has learned the dynamics (0.06 was used before).
        settling: Last part of the training, in which the rate falls to 0 and `raised` with it.
        narrowing: Parts of the training between which an edge budget is narrowed: it begins when
            the dynamics are known, and ends when the rate still moves gates.
    """

    least_path_weight: float = 2e-3
    most_path_weight: float = 0.01
    least_edge_weight: float = 4e-5
    most_edge_weight: float = 0.1
    cheaper: float = 0.02
    dearer: float = 0.005
    edges_cheaper: float = 0.1
    edges_dearer: float = 0.01
    edges_smoothing: float = 0.9
    near: float = 2.0
    raised: float = 0.03
    settling: float = 0.6
    narrowing: tuple[float, float] = (0.2, 0.6)


SETTINGS = Settings()


def unsettled(progress: float) -> float:
    """Return 1, falling to 0 in the last 60 % of the training: of the rate, and what it costs.

    Args:
        progress: Part of the training that is over, in [0, 1].
    """
    return min(1.0, (1 - progress) / SETTINGS.settling)


@dataclass(frozen=True)
class ErrorBudget:
    """As few paths as an error allows.

    Attributes:
        limit: τ, mean squared error in units of σ.
    """

    limit: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise WorldError(f"ErrorBudget(limit={self.limit}) given; a positive error is needed.")

    def check(self, identity_error: float) -> None:
        """Raise if a model without any interaction meets the budget.

        Args:
            identity_error: Held-out error of the model in mode "identity".

        Raises:
            WorldError: The empty graph would be the answer whatever the data.
        """
        if self.limit >= identity_error:
            raise WorldError(
                f"The error budget is {self.limit:.4g}, and a model in which no object sees "
                f"another, nor the intervention, reaches {identity_error:.4g}: the empty graph "
                "satisfies it, and a graph learned under it would mean nothing. Ask for a smaller "
                "error, or train for longer, in a new run."
            )


@dataclass(frozen=True)
class EdgeBudget:
    """As little error as a number of edges allows.

    Attributes:
        limit: k, edges between objects in the mean of all states.
    """

    limit: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise WorldError(f"EdgeBudget(limit={self.limit}) given; a positive number is needed.")


class Constraint:
    """A budget and its multiplier.

    Args:
        budget: Which.
        objects: N of the data.
        rows: Which paths are counted.
    """

    def __init__(
        self,
        budget: ErrorBudget | EdgeBudget,
        objects: int,
        rows: Rows = "decoded",
    ) -> None:
        self.budget = budget
        self.rows: Rows = rows
        self.objects = objects
        self.most_edges = float(objects * (objects - 1))
        if isinstance(budget, ErrorBudget):
            self.minimum = 1 / SETTINGS.most_path_weight
            self.maximum = 1 / SETTINGS.least_path_weight
            self.multiplier = self.maximum
        else:
            self.minimum = SETTINGS.least_edge_weight / objects
            self.maximum = SETTINGS.most_edge_weight / objects
            self.multiplier = self.minimum
        self.memory: float | None = None
        self.presses = False  # once true, for good: the error may rise again while paths close

    def limit_at(self, progress: float) -> float:
        """Return what is allowed after a part of the training."""
        if isinstance(self.budget, ErrorBudget):
            return self.budget.limit + SETTINGS.raised * unsettled(progress)
        begin, end = SETTINGS.narrowing
        left = 1 - min(1.0, max(0.0, (progress - begin) / (end - begin)))
        return self.budget.limit + max(0.0, self.most_edges - self.budget.limit) * left**3

    def loss(
        self, error: Tensor, seen: float, adjacency: Tensor, progress: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of one batch and what was measured; then move the multiplier.

        Args:
            error: MSE of the batch, differentiable.
            seen: MSE of its states in which no gate was closed at random.
            adjacency: A of those states, `[L, …, N + 1, N + 1]`, differentiable.
            progress: Part of the training that is over, in [0, 1].
        """
        by_error = isinstance(self.budget, ErrorBudget)
        counted: Rows = self.rows if by_error else "edges"
        paths = count_paths(adjacency, counted).mean()
        multiplier = self.multiplier
        path_weight = (1 / multiplier if by_error else multiplier) if self.presses else 0.0
        loss = error + path_weight * paths
        edges = read_graph(adjacency).edges.float().sum((1, 2)).mean()
        total, mean_edges = torch.stack((paths, edges)).tolist()
        measured = seen if by_error else mean_edges
        limit = self.limit_at(progress)
        violation = measured / limit - 1
        row = {
            "error": seen,
            "paths": total,
            "edges": mean_edges,
            "multiplier": multiplier,
            "path_weight": path_weight,
            "violation": violation,
        }
        self.multiplier, self.memory = self._rule().update(multiplier, violation, self.memory)
        near = 1 + self.memory < SETTINGS.near
        self.presses |= near if by_error else progress >= SETTINGS.narrowing[0]
        return loss, row

    def _rule(self) -> Multiplicative:
        s = SETTINGS
        if isinstance(self.budget, ErrorBudget):
            return Multiplicative(s.cheaper, s.dearer, self.maximum, self.minimum)
        return Multiplicative(
            s.edges_dearer, s.edges_cheaper, self.maximum, self.minimum, smoothing=s.edges_smoothing
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue."""
        return {
            "multiplier": self.multiplier,
            "memory": self.memory,
            "presses": self.presses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        self.multiplier, self.memory = state["multiplier"], state["memory"]
        self.presses = state["presses"]
