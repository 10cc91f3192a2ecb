"""Sample inputs: a tensor, a tuple of positional or a dict of keyword arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any


def run_on(model: Callable[..., Any], sample: Any) -> Any:
    """Call a model on a sample input."""
    if isinstance(sample, Mapping):
        return model(**sample)
    if isinstance(sample, tuple | list):
        return model(*sample)
    return model(sample)


def run_on_copy(model: Callable[..., Any], sample: Any) -> Any:
    """Call a model on a copy of a sample input, which it may write into."""
    return run_on(model, copy.deepcopy(sample))
