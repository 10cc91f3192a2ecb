"""`Coverage`: how much of a model a budget speaks of, and what it leaves out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from spartan.weights.computed import computed_parameters
from spartan.weights.names import plain_name, wrapper_prefix
from spartan.weights.prunable import Prunable

_log = logging.getLogger("spartan")
_SHOWN = 4  # names; more make no line


@dataclass(frozen=True)
class Coverage:
    """How many of a model's weights are prunable. Biases and norms are not counted.

    Attributes:
        prunable: Number of weights that the budget speaks of.
        total: Number of weights in all matrices and kernels of the model.
        left_out: Name and kind of what is left out, and how many weights it has; largest first.
        computed: Names of layers left out because their weight is computed from other parameters.
    """

    prunable: int
    total: int
    left_out: tuple[tuple[str, str, int], ...]
    computed: tuple[str, ...]

    @property
    def low(self) -> bool:
        """Whether the budget speaks of less than half of the model."""
        return 2 * self.prunable < self.total

    def __str__(self) -> str:
        line = f"prunable {self.prunable:,} of {self.total:,} weights"
        if not self.left_out:
            return line
        shown = [f"{name!r} ({kind}, {count:,})" for name, kind, count in self.left_out[:_SHOWN]]
        more = len(self.left_out) - len(shown)
        return f"{line}: left out {', '.join(shown)}" + (f" and {more} more" if more else "")


def coverage_of(model: nn.Module, weights: Sequence[Prunable]) -> Coverage:
    """Count what a budget for these weights speaks of.

    Args:
        model: The model.
        weights: What is prunable of it.
    """
    known = {weight.parameter for weight in weights}
    computed = computed_parameters(model)
    left: dict[str, tuple[str, int]] = {}
    prefix, total = wrapper_prefix(model), sum(weight.numel for weight in weights)
    broken: list[str] = []
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        name = plain_name(f"{path}." if path else "", prefix).removesuffix(".")
        for key, parameter in module._parameters.items():
            if parameter is None or parameter.dim() < 2 or parameter in known | seen:
                continue
            seen.add(parameter)
            total += parameter.numel()
            kind = computed.get(parameter, type(module).__name__)
            if parameter in computed:
                name = name.partition(".parametrizations")[0]
                name = "" if name.startswith("parametrizations") else name
                broken.append(f"{name!r} ({kind})")
            shown = name if type(module).__module__.startswith("torch.nn") and name else ""
            shown = shown or f"{name}.{key}".lstrip(".")
            left[shown] = kind, left.get(shown, ("", 0))[1] + parameter.numel()
    rows = sorted(((n, k, c) for n, (k, c) in left.items()), key=lambda row: -row[2])
    return Coverage(
        total - sum(count for _, _, count in rows), total, tuple(rows), tuple(dict.fromkeys(broken))
    )


def say_coverage(coverage: Coverage, decided: bool, stacklevel: int) -> None:
    """Say in one line how much of the model the budget governs; loudly if under half of it.

    Args:
        coverage: What was counted.
        decided: Whether the user has decided what to leave out.
        stacklevel: Of the warnings: whose line they name.
    """
    if coverage.computed and not decided:
        warnings.warn(
            f"Left out, and dense: {', '.join(coverage.computed)}; prunable are "
            f"{coverage.prunable:,} of {coverage.total:,} weights. To prune the others, make them "
            "plain parameters first (remove_parametrizations, remove_weight_norm, prune.remove).",
            stacklevel=stacklevel,
        )
    elif coverage.low and not decided:
        warnings.warn(
            f"The budget speaks of less than half of the model: {coverage}. Name modules or "
            "parameters in include= to prune them too.",
            stacklevel=stacklevel,
        )
    else:
        _log.info("%s", coverage)
