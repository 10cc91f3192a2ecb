r"""The two budgets of a world model, and the loss that keeps each.

    error budget (as published)     min E|Ā|        s.t.  E MSE ≤ τ        L = (MSE - τ) + |Ā| / λ
    edge budget                     min E MSE       s.t.  E edges ≤ k      L = MSE + λ |Ā|

In both, λ follows the relative violation, on a moving average (`multipliers.Multiplicative`); the
weight of the paths is 1/λ in the first, and λ in the second. It starts at its smallest, where the
loss of all paths together is a small part of the error: paths that are closed before the dynamics
are known do not open again.

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
from spartan.world_model.model import Prediction, TransitionConfig
from spartan.world_model.paths import Rows, count_paths, read_graph

# λ starts at this many times the ratio of all paths of the open model to the error allowed.

_START = 20.0
_FAST, _SLOW = 0.02, 0.02


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
                f"another reaches {identity_error:.4g}: the empty graph satisfies it, and a graph "
                "learned under it would mean nothing. Ask for a smaller error, or train the "
                "models for longer."
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
        config: Of the model.
        objects: N of the data.
        rows: Which paths are counted.
    """

    def __init__(
        self,
        budget: ErrorBudget | EdgeBudget,
        config: TransitionConfig,
        objects: int,
        rows: Rows = "decoded",
    ) -> None:
        self.budget = budget
        self.rows: Rows = rows
        n = objects + 1
        ends = objects if rows == "decoded" else n
        self.most_paths = ends * float(n + 1) ** config.layers
        if isinstance(budget, ErrorBudget):
            self.multiplier: float = _START * self.most_paths / budget.limit
            self.rule = Multiplicative(rise=_FAST, fall=_SLOW, maximum=self.multiplier)
        else:
            self.multiplier = 1 / (_START * self.most_paths)
            self.rule = Multiplicative(rise=_SLOW, fall=_FAST, maximum=1.0)
        self.memory: float | None = None

    @property
    def path_weight(self) -> float:
        """What a path costs, in units of the error."""
        return 1 / self.multiplier if isinstance(self.budget, ErrorBudget) else self.multiplier

    def loss(self, error: Tensor, prediction: Prediction) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of one batch and what was measured; then move the multiplier.

        Args:
            error: MSE of the batch, differentiable.
            prediction: What it is the error of.
        """
        paths = count_paths(prediction.adjacency, self.rows).mean()
        loss = error + self.path_weight * paths
        edges = read_graph(prediction.adjacency).edges.float().sum((1, 2)).mean()
        seen, total, mean_edges = torch.stack((error, paths, edges)).tolist()
        measured = seen if isinstance(self.budget, ErrorBudget) else mean_edges
        violation = measured / self.budget.limit - 1
        row = {
            "error": seen,
            "paths": total,
            "edges": mean_edges,
            "multiplier": self.multiplier,
            "path_weight": self.path_weight,
            "violation": violation,
        }
        self.multiplier, self.memory = self.rule.update(self.multiplier, violation, self.memory)
        return loss, row

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue."""
        return {"multiplier": self.multiplier, "memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        self.multiplier, self.memory = state["multiplier"], state["memory"]
