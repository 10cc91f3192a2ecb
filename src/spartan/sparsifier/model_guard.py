"""`ModelGuard`: whoever runs or saves the model inside of an optimizer's step sees w."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spartan.sparsifier.pass_hooks import PassHook


class ModelGuard:
    """Hooks on a model that are there during a step only, where normally nobody uses it.

    A custom optimizer may run or save the model in the middle of its step, and a model is used
    after a step that broke off.

    Args:
        model: The model.
        show: Called before the model is used: let the parameters hold w.
        hide: Called after that: let them hold what they held, if the step goes on.
    """

    def __init__(
        self, model: nn.Module, show: Callable[[], None], hide: Callable[[], None]
    ) -> None:
        self._model, self._show, self._hide = model, show, hide
        self._handles: list[RemovableHandle] = []
        self._depth = 0

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._depth = [], 0

    def open(self, governed: Sequence[Tensor]) -> None:
        """Hook the model; the states it returns hold copies of the governed parameters."""
        self.close()
        memory = {tensor.untyped_storage().data_ptr() for tensor in governed}

        def copied(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
            if module is not self._model:
                return  # a copy of it that was made during a step
            for key, value in state.items():
                if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in memory:
                    state[key] = value.detach().clone()
            self._leave()

        begin = PassHook(self._model, self._enter)
        self._handles = [
            self._model.register_forward_pre_hook(begin),
            self._model.register_forward_hook(PassHook(self._model, self._leave), always_call=True),
            self._model.register_state_dict_pre_hook(begin),
            self._model.register_state_dict_post_hook(copied),
        ]

    @torch.no_grad()
    def _enter(self, training: bool = False) -> None:
        self._depth += 1
        if self._depth == 1:
            self._show()

    @torch.no_grad()
    def _leave(self, training: bool = False) -> None:
        self._depth -= 1
        if self._depth == 0 and self._handles:
            self._hide()
