"""Calibration data: a few hundred unlabelled inputs of a model, held in memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spartan.errors import CalibrationError
from spartan.example_inputs import run_on
from spartan.post_training.sample_axis import check_sample_axis

_LABELS = ("labels", "label")


@dataclass(frozen=True)
class _Bank:
    """Samples of one form: tensors stacked along their first dimension, in a skeleton.

    Attributes:
        skeleton: The batch with `_Leaf(i)` where the i-th tensor was.
        tensors: Each with all samples.
    """

    skeleton: Any
    tensors: list[Tensor]

    def __len__(self) -> int:
        return len(self.tensors[0])

    def take(self, samples: Tensor, device: torch.device) -> Any:
        """Return a batch of some samples."""
        return _fill(self.skeleton, [t[samples].to(device) for t in self.tensors])


@dataclass(frozen=True)
class _Leaf:
    number: int


class Calibration:
    """Inputs to calibrate with, of which batches are made anew.

    Args:
        inputs: A tensor with the samples along its first dimension; a tuple of such tensors, the
            positional arguments of one call, or a dict of keyword arguments; or an iterable of
            batches, as a data loader yields them: tensors, tuples or dicts. What `forward` does not
            take, as labels, is left out. (A tuple of more tensors of one kind than `forward` takes,
            as `tensor.split` returns, is one of batches; of as many as are optional, refused.)
        model: The module that takes them.

    Raises:
        CalibrationError: There is no sample, or a batch is of none of these kinds.
    """

    def __init__(self, inputs: Any, model: nn.Module) -> None:
        self._banks: list[_Bank] = []
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        needed, taken = _positional(model)
        whole = isinstance(inputs, Tensor | Mapping) or _is_one_call(inputs, needed, taken)
        batches = [inputs] if whole else inputs
        if not isinstance(batches, Iterable):
            raise CalibrationError(
                f"Calibration data are {type(inputs).__name__}; give a tensor with the samples "
                "along its first dimension, or an iterable of batches (a data loader)."
            )
        gathered: dict[str, tuple[Any, list[list[Tensor]]]] = {}
        self._first: Any = None
        for batch in batches:
            self._first = batch if self._first is None else self._first
            skeleton, tensors = _strip(_without_labels(batch, taken))
            if not tensors:
                raise CalibrationError(
                    f"A calibration batch is {type(batch).__name__} without a tensor; give "
                    "tensors, tuples of positional or dicts of keyword arguments."
                )
            if any(t.dim() == 0 or len(t) != len(tensors[0]) for t in tensors):
                shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
                raise CalibrationError(
                    f"A calibration batch holds tensors of {shapes}: all need the samples along "
                    "their first dimension."
                )
            form = f"{skeleton}{[(t.shape[1:], t.dtype) for t in tensors]}"
            gathered.setdefault(form, (skeleton, []))[1].append(tensors)
        for skeleton, parts in gathered.values():
            stacked = [torch.cat(same).detach() for same in zip(*parts, strict=True)]
            if len(stacked[0]):
                self._banks.append(_Bank(skeleton, stacked))
        if not self._banks:
            raise CalibrationError("There is no calibration sample: give a few hundred.")

    def __len__(self) -> int:
        return sum(len(bank) for bank in self._banks)

    def check_first_dimension(self, model: nn.Module) -> None:
        """Refuse data whose first dimension are not samples to this model.

        Raises:
            CalibrationError: It is not, or the model does not run on them.
        """
        try:
            for bank in self._banks:
                shapes = [tensor.shape for tensor in bank.tensors]
                check_sample_axis(model, shapes, partial(bank.take, device=self._device))
        except CalibrationError:
            raise
        except Exception as error:
            self.refuse_single_samples(model, error)
            raise CalibrationError(
                f"The model does not run on the calibration data: {type(error).__name__}: {error}"
            ) from error

    def refuse_single_samples(self, model: nn.Module, error: Exception) -> None:
        """Say so if the model, which failed on batches, takes what was given as a sample of one.

        Raises:
            CalibrationError: It does.
        """
        skeleton, tensors = _strip(_without_labels(self._first, _positional(model)[1]))
        try:
            with torch.no_grad():
                run_on(model, _fill(skeleton, [t[None].to(self._device) for t in tensors]))
        except Exception:
            return  # it fails for another reason, which was told
        shape = tuple(tensors[0].shape)
        raise CalibrationError(
            f"The calibration data begin with a tensor of {shape}, which is one sample to this "
            "model and not a batch: put samples together with torch.stack(samples), or give a data "
            "loader with batches of them."
        ) from error

    def split(self, held_out: int, seed: int) -> tuple[Calibration, Calibration]:
        """Return two parts, the second with `held_out` samples, drawn at random."""
        generator = torch.Generator().manual_seed(seed)
        last = torch.randperm(len(self), generator=generator)[:held_out].sort().values
        parts = object.__new__(Calibration), object.__new__(Calibration)
        for part in parts:
            part._banks, part._device = [], self._device
        first = 0
        for bank in self._banks:
            inside = last[(last >= first) & (last < first + len(bank))] - first
            chosen = torch.zeros(len(bank), dtype=torch.bool)
            chosen[inside] = True
            for part, mask in zip(parts, (~chosen, chosen), strict=True):
                if mask.any():
                    index = mask.nonzero().squeeze(1)
                    part._banks.append(_Bank(bank.skeleton, [t[index] for t in bank.tensors]))
            first += len(bank)
        return parts

    def batches(self, size: int) -> list[Any]:
        """Return all samples in order, in batches of at most `size` and of about one size."""
        return [
            bank.take(part, self._device)
            for bank in self._banks
            for part in torch.arange(len(bank)).tensor_split(-(-len(bank) // size))
        ]

    def shuffled(self, size: int, generator: torch.Generator) -> Iterator[Any]:
        """Yield batches of at most `size` in random order, without end."""
        while True:
            parts = [
                (bank, part)
                for bank in self._banks
                for part in torch.randperm(len(bank), generator=generator).split(size)
                if len(part) == size or len(bank) < size
            ]
            for i in torch.randperm(len(parts), generator=generator).tolist():
                bank, part = parts[i]
                yield bank.take(part, self._device)


def _positional(model: nn.Module) -> tuple[int, int | None]:
    """Return how many positional arguments a model needs, and takes: None for any number."""
    inner: Any = model
    while hasattr(inner, "_orig_mod") or isinstance(inner, nn.DataParallel):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    try:
        parameters = inspect.signature(inner.forward).parameters.values()
    except ValueError:  # a scripted module keeps it to itself
        return 1, None
    own = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is p.empty for p in own)
    return needed, None if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(own)


def _is_one_call(inputs: Any, needed: int, taken: int | None) -> bool:
    """Whether a tuple of tensors holds the arguments of one call, and not batches.

    Raises:
        CalibrationError: It could be either.
    """
    tensors = isinstance(inputs, tuple) and all(isinstance(x, Tensor) for x in inputs)
    if not tensors or not inputs or any(x.dim() == 0 or len(x) != len(inputs[0]) for x in inputs):
        return False
    kinds = {(x.dim(), x.dtype) for x in inputs}
    if len(inputs) <= needed or len(kinds) > 1:  # several kinds, such as images and labels
        return True
    if taken is not None and len(inputs) > taken:
        return False
    raise CalibrationError(
        f"A tuple of {len(inputs)} tensors of one kind may be as many batches, or the arguments of "
        "one call, since forward has optional ones: give a list of the batches, or a dict of the "
        "arguments by name."
    )


def _without_labels(batch: Any, taken: int | None) -> Any:
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key not in _LABELS}
    if isinstance(batch, tuple | list):
        return tuple(batch[:taken])
    return batch


def _strip(value: Any) -> tuple[Any, list[Tensor]]:
    """Return a batch with its tensors replaced by leaves, and the tensors."""
    tensors: list[Tensor] = []

    def strip(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return _Leaf(len(tensors) - 1)
        if isinstance(value, Mapping):
            return {key: strip(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return tuple(strip(item) for item in value)
        return value

    return strip(value), tensors


def _fill(skeleton: Any, tensors: list[Tensor]) -> Any:
    if isinstance(skeleton, _Leaf):
        return tensors[skeleton.number]
    if isinstance(skeleton, dict):
        return {key: _fill(item, tensors) for key, item in skeleton.items()}
    if isinstance(skeleton, tuple):
        return tuple(_fill(item, tensors) for item in skeleton)
    return skeleton
