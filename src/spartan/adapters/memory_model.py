"""`MemoryModel`: a frozen transformer with SPARTAN memories, their usage and balance loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spartan.adapters.base import AdapterConfig
from spartan.adapters.memory import Memory, MemoryConfig, batch_first
from spartan.adapters.model import AdapterModel
from spartan.errors import AdapterError

# Arguments that say which positions count, and the value that says so.
_MASKS = {"attention_mask": True, "src_key_padding_mask": False}


_IGNORED = -100  # label of what does not count, in transformers


class MemoryModel(AdapterModel):
    """A frozen transformer with a sparse memory after each layer; see `AdapterModel`."""

    config_class: ClassVar[type[AdapterConfig]] = MemoryConfig

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """Call the backbone with the active adapter.

        In training with `balance_loss`, an output that has a loss gets the balance loss added.
        """
        valid = self._valid(args, kwargs)
        output = super().forward(*args, labels=labels, **kwargs)
        if self.training and getattr(output, "loss", None) is not None and self._balanced():
            share = _share_of_step(labels, kwargs.get("num_items_in_batch"))
            output.loss = output.loss + share * self.balance_loss(valid)
        return output

    def balance_loss(self, valid: Tensor | None = None) -> Tensor:
        """Return what the last forward pass in training adds to the loss.

        With the mean activity A_n of the parents over all positions that count,

            L = balance_loss · mean over layers of (1/N) Σ_n A_n²

        which is least, balance_loss / N², where all parents are used alike.

        Args:
            valid: (batch, positions), true where a position counts; all do by default.

        Raises:
            AdapterError: No memory is balanced, or there was no forward pass in training.
        """
        found = [memory.activity for _, memory in self._memories() if memory.activity is not None]
        if not found or not self._balanced():
            raise AdapterError(
                "There is no activity to balance: set balance_loss in MemoryConfig, and call the "
                "model in training first."
            )
        means = [_mean_over(a, valid, (0, 1)) for a in found]
        loss: Tensor = torch.stack([mean.square().mean() for mean in means]).mean()
        return loss * float(self._config().balance_loss)

    @torch.no_grad()
    def memory_usage(self, batch: Mapping[str, Any] | Tensor) -> dict[str, Tensor]:
        """Return how much each example reads of each parent.

        Args:
            batch: Inputs of the model, by name, or one tensor. Positions that `attention_mask` or
                `src_key_padding_mask` excludes do not count.

        Returns:
            By the path of the layer, (examples, N): the mean of a over positions. Rows sum to 1,
            but for examples without a position that counts.

        Raises:
            AdapterError: No memory is active.
        """
        args, kwargs = ((batch,), {}) if isinstance(batch, Tensor) else ((), dict(batch))
        valid = self._valid(args, kwargs)
        usage: dict[str, Tensor] = {}
        handles = []
        for path, memory in self._memories():

            def observe(module: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
                h, _, layer = inputs
                usage[path] = _mean_over(batch_first(module.attend(h), layer), valid, (1,))  # type: ignore[operator]

            handles.append(memory.register_forward_hook(observe))
        try:
            self.base_model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return usage

    def _memories(self) -> list[tuple[str, Memory]]:
        adapter = self._active_adapter()
        return list(zip(adapter.paths, adapter.add_ons, strict=True))  # type: ignore[arg-type]

    def _config(self) -> Any:
        return self._active_adapter().config

    def _balanced(self) -> bool:
        return self._active is not None and self._config().balance_loss > 0

    def _valid(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return which positions count, as the inputs say."""
        named = inspect.signature(self.forward).bind_partial(*args, **kwargs).arguments
        for name, counts in _MASKS.items():
            mask = kwargs.get(name, named.get(name))
            if isinstance(mask, Tensor) and mask.dim() == 2:
                # A padding mask may also be added to logits: 0 where a position counts.
                return mask.bool() if counts else mask == 0
        return None


def _share_of_step(labels: Any, items: Any) -> Any:
    """Return how much of an optimizer step a batch is, where transformers' Trainer says it.

    It then adds up the losses of the batches instead of taking their mean.
    """
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    return (labels != _IGNORED).sum() / items


def _mean_over(a: Tensor, valid: Tensor | None, dims: tuple[int, ...]) -> Tensor:
    """Return the mean of a (batch, positions, N) over the positions that count."""
    if valid is None:
        return a.mean(dims)
    weights = valid[:, -a.shape[1] :].to(a).unsqueeze(-1)
    return (a * weights).sum(dims) / weights.sum(dims).clamp(min=1)


def get_memory_model(
    base: nn.Module, config: MemoryConfig | None = None, adapter_name: str = "default"
) -> MemoryModel:
    """Freeze a transformer and add a memory after each of its layers.

    Args:
        base: A model of transformers, an `nn.TransformerEncoder`, or another one, for which
            `target_layers` says where its layers are. It is used in place: its weights, and the
            keys of its state, never change.
        config: Sizes and options; the published sizes by default.
        adapter_name: Name of this adapter.

    Raises:
        AdapterError: The memory does not fit the model, which is untouched then.
    """
    return MemoryModel(base, config if config is not None else MemoryConfig(), adapter_name)


def get_adapter_model(
    base: nn.Module, config: AdapterConfig, adapter_name: str = "default"
) -> AdapterModel:
    """Freeze a model and add an adapter of any kind; arguments as of `get_memory_model`."""
    kind = MemoryModel if isinstance(config, MemoryConfig) else AdapterModel
    return kind(base, config, adapter_name)
