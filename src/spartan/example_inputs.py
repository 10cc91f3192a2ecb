"""Runs a model on an example input, and collects the tensors of its output."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def run_on(model: Callable[..., Any], example_input: Any) -> Any:
    """Call a model on an example input."""
    if isinstance(example_input, Mapping):
        return model(**example_input)
    if isinstance(example_input, tuple | list):
        return model(*example_input)
    return model(example_input)


def run_on_copy(model: Callable[..., Any], example_input: Any) -> Any:
    """Call a model on a copy of an example input, which it may write into."""
    return run_on(model, copy.deepcopy(example_input))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an output: a tensor, or dicts, lists, tuples or dataclasses of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))
