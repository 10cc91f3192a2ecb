"""`Inputs`: what `bench` and `export` feed a model, from shapes, names and dtypes as typed."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spartan.errors import ConfigError, DeployError
from spartan.example_inputs import tensors_of

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
        *(torch.int64, torch.int32, torch.uint8, torch.bool),
    )
}
_SPEC = re.compile(r"(?:(?P<name>[^\W\d]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_USAGE = (
    "write its sizes like 1x3x32x32, batch first; with a name and a dtype like "
    "input_ids=1x128:int64; or name a function that returns an input, like package.module:function"
)


@dataclass(frozen=True)
class InputTensor:
    """One tensor of an input.

    Attributes:
        name: Of the argument; empty if it goes by position.
        shape: Batch first.
        dtype: Of its numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


class Inputs:
    """What `--input` says: nothing, tensors to draw, or a function that returns an input.

    Args:
        texts: One for each tensor, like `1x3x32x32` or `input_ids=1x128:int64`; or one function,
            like `package.module:function`.

    Raises:
        DeployError: They are none of these.
        ConfigError: The function cannot be found, or fails.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._made: Any = None
        self._tensors: list[InputTensor] = []
        if len(texts) == 1 and ":" in texts[0] and _SPEC.fullmatch(texts[0]) is None:
            self._made = _call(texts[0])
        else:
            self._tensors = [_parse(text) for text in texts]
        names = [tensor.name for tensor in self._tensors if tensor.name]
        if len(set(names)) != (len(self._tensors) if names else 0):
            raise DeployError("--input: give all inputs a name of their own, or none.")

    @property
    def shape(self) -> tuple[int, ...] | None:
        """That of the first tensor, if there is one."""
        if self._tensors:
            return self._tensors[0].shape
        return next((tuple(x.shape) for x in tensors_of(self._made)), None)

    def make(self, model: nn.Module, shape: Sequence[int], batch: int | None = None) -> Any:
        """Return an input for a model: a tensor, a tuple of them, or a dict by name.

        Floats are normal, integers those that every table of the model (`nn.Embedding`) has a row
        for.

        Args:
            model: The model.
            shape: Of an input, if nothing was said.
            batch: Size of the first dimension; by default what was said.

        Raises:
            DeployError: There is no memory for it, or a function says what the batch is.
        """
        if self._made is not None:
            if batch not in (None, (self.shape or (None,))[0]):
                raise DeployError("--batch: the function of --input says how large the batch is.")
            return self._made
        tensors = self._tensors or [InputTensor("", tuple(shape))]
        if batch is not None:
            tensors = [replace(tensor, shape=(batch, *tensor.shape[1:])) for tensor in tensors]
        rows = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
        generator = torch.Generator().manual_seed(0)
        drawn = [_draw(tensor, min(rows, default=2), generator) for tensor in tensors]
        if tensors[0].name:
            return {tensor.name: x for tensor, x in zip(tensors, drawn, strict=True)}
        return drawn[0] if len(drawn) == 1 else tuple(drawn)


def _call(text: str) -> Any:
    module, _, name = text.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)()
        if not any(True for _ in tensors_of(made)):
            raise TypeError(f"it returned {type(made).__name__} without a tensor")
        return made
    except Exception as error:
        # It is the user's code that runs.
        raise ConfigError(
            f"--input {text}: {type(error).__name__}: {error}. It names a function without "
            "arguments that returns an input: a tensor, a tuple of them or a dict."
        ) from error


def _parse(text: str) -> InputTensor:
    found = _SPEC.fullmatch(text)
    sizes = tuple(int(n) for n in found["shape"].split("x")) if found else ()
    if found is None or min(sizes) < 1 or math.prod(sizes) >= 1 << 48:
        raise DeployError(f"{text!r} is no input; {_USAGE}.")
    dtype = found["dtype"] or "float32"
    if dtype not in _DTYPES:
        raise DeployError(f"{text!r} has no dtype {dtype!r}; choose from {', '.join(_DTYPES)}.")
    return InputTensor(found["name"] or "", sizes, _DTYPES[dtype])


def _draw(tensor: InputTensor, rows: int, generator: torch.Generator) -> Tensor:
    try:
        if tensor.dtype is torch.bool:
            return torch.ones(tensor.shape, dtype=torch.bool)
        if not tensor.dtype.is_floating_point:
            most = min(rows, torch.iinfo(tensor.dtype).max)
            return torch.randint(0, most, tensor.shape, dtype=tensor.dtype, generator=generator)
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    except RuntimeError as error:
        size = "x".join(map(str, tensor.shape))
        raise DeployError(f"An input of {size} does not fit this machine: {error}") from error
