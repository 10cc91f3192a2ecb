"""What rows of metrics and facts of a saved model look like; what is wrong with others."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

# Numbers that later become shapes, counts or pictures are bounded by what those can hold.
_Count = Annotated[int, Meta(ge=0, le=2**53)]
_Seconds = Annotated[float, Meta(ge=0)]


class _Row(msgspec.Struct):
    step: _Count
    split: str
    epoch: Annotated[float, Meta(ge=0, le=2**53)] = 0.0


class _Images(msgspec.Struct):
    channels: Annotated[int, Meta(ge=1, le=3)]
    size: Annotated[int, Meta(ge=1, le=16_384)]
    classes: Annotated[list[str], Meta(min_length=1)]
    mean: Annotated[list[float], Meta(min_length=1, max_length=3)]
    std: Annotated[list[float], Meta(min_length=1, max_length=3)]


class _Layer(msgspec.Struct):
    name: str
    units: _Count
    kept_units: _Count
    cost: Annotated[float, Meta(ge=0)]
    shape: list[_Count] = []
    error: float | None = None
    seconds: _Seconds = 0.0


class _Compression(msgspec.Struct):
    settings: dict[str, Any]
    samples: tuple[_Count, _Count]
    phases: dict[str, _Seconds]
    held_out_loss: float
    unreached: list[str]


class _Method(msgspec.Struct):
    name: str


class _Facts(msgspec.Struct):
    step: _Count
    total_steps: _Count
    method: _Method
    images: dict[str, Any]  # `_Images`, or empty where there were none
    layers: Annotated[list[_Layer], Meta(min_length=1)]
    monitor: dict[str, float] = {}
    compression: _Compression | None = None


def row_problem(row: Any) -> str:
    """Return what keeps a value from being a row of metrics, nothing if it is one."""
    problem = _problem(row, _Row)
    if problem:
        return problem
    for key, value in row.items():
        if key != "split" and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"{key!r} is no number"
    return ""


def facts_problem(facts: Any) -> str:
    """Return what keeps a value from being the facts of a saved model, nothing if it is that."""
    problem = _problem(facts, _Facts)
    if problem or not facts["images"]:
        return problem
    images = facts["images"]
    problem = _problem(images, _Images)
    if problem:
        return f"of its images, {problem}"
    if {len(images["mean"]), len(images["std"])} != {images["channels"]}:
        return "mean and std of its images have not one number a channel"
    return "" if all(std > 0 for std in images["std"]) else "std of its images must be positive"


def _problem(value: Any, kind: type) -> str:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        return str(error).rstrip(".")
    except (OverflowError, RecursionError) as error:  # numbers of a thousand digits, deep lists
        return str(error)
    return ""
