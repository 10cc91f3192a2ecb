"""`PassHook`: notices when somebody runs or saves the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod

import torch
from torch import nn

# What a compiler says where it may not leave the graph; torch 2.6 does not take a reason.
_REASON = (
    "methods that sample write other weights before each pass: give the compiled model to the "
    "Sparsifier, or compile with fullgraph=False"
)
_TAKEN = "reason" in inspect.signature(torch.compiler.disable).parameters
_WHY: dict[str, Any] = {"reason": _REASON} if _TAKEN else {}


class PassHook:
    """A hook, of passes or of state dicts, that tells a sparsifier what kind of pass there is.

    Copies and pickles of the model carry a hook that does nothing.

    Args:
        model: The module whose passes are told.
        before: Called with whether it is a training pass; held weakly.
    """

    def __init__(
        self, model: nn.Module | None = None, before: Callable[[bool], None] | None = None
    ) -> None:
        self._model = None if model is None else id(model)
        self._before = None if before is None else WeakMethod(before)

    @torch.compiler.disable(**_WHY)  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, *args: Any) -> None:
        before = None if self._before is None else self._before()
        if before is not None and id(module) == self._model:
            before(module.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> PassHook:
        return PassHook()

    def __reduce__(self) -> tuple[type[PassHook], tuple[()]]:
        return PassHook, ()
