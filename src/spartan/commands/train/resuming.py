"""What a checkpoint says of its run, and what keeps a run from going on from it."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from spartan.checksums import bytes_of
from spartan.commands.images import ImageData, Images
from spartan.commands.options.files import from_json, refuse_changes, to_json
from spartan.commands.options.train import TrainConfig
from spartan.errors import StateError

# Options that may change when a run is resumed: where and how it is computed, not what.
MAY_CHANGE = {"device", "workers", "out"}
_LOOKED_AT = 64  # images, evenly spaced: large data are decoded as they are read


def described(config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """Return what a checkpoint keeps of a run's options and data."""
    return {
        "options": to_json(config),
        "data": {
            "training images": len(data.train.labels),
            "test images": len(data.test.labels),
            "checksum of training images": _checksum(data.train),
            "checksum of test images": _checksum(data.test),
            **data.facts(),
        },
    }


def _checksum(images: Images) -> int:
    """Return a number that is another for other labels, or for others of some images."""
    count = len(images.labels)
    some = images.read(range(0, count, max(1, count // _LOOKED_AT)))
    return zlib.crc32(bytes_of(some), zlib.crc32(bytes_of(images.labels.to(torch.int64))))


def refuse_another_run(
    state: dict[str, Any], config: TrainConfig, described_now: dict[str, Any]
) -> None:
    """Refuse to go on with other options or other data than a checkpoint was made with.

    Args:
        state: The checkpoint; older ones say nothing of it.
        config: The options now.
        described_now: What `described` returns now.

    Raises:
        ConfigError: An option is another.
        StateError: The data are others.
    """
    told = state.get("run")
    if told is None:
        return
    refuse_changes(from_json(TrainConfig, told["options"], "the checkpoint"), config, MAY_CHANGE)
    here = described_now["data"]
    for what, before in told["data"].items():
        now = here.get(what)
        if before != now:
            raise StateError(
                f"The data have changed since the checkpoint: {what} was {before!r:.60} and is "
                f"{now!r:.60}. Give the data of then, or start a new run with --out."
            )


def refuse_misfit(state: dict[str, Any], optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Refuse what would load and fail, or do another thing, in a later step.

    Args:
        state: The checkpoint.
        optimizer: That of the run.
        steps: Of the whole run.

    Raises:
        StateError: The checkpoint does not belong to this run.
    """
    step, tally = state["step"], state["tally"]
    if type(step) is not int or not 0 <= step <= steps or step != state["facts"]["step"]:
        raise StateError(f"its step is {step!r}")
    if not isinstance(tally, Tensor) or tally.shape != (3,):
        raise StateError("its running sums are not three numbers")
    given, own = state["optimizer"], optimizer.state_dict()
    for group, mine in zip(given["param_groups"], own["param_groups"], strict=True):
        for key, value in mine.items():
            if key in group and type(group[key]) is not type(value):
                raise StateError(f"its optimizer's {key} is {group[key]!r:.60}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in given["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise StateError(f"its optimizer has a state of {index!r:.60}")
        for key, value in entries.items():
            shape = getattr(value, "shape", ())
            number = value is None or isinstance(value, int | float | Tensor)
            if not number or shape not in ((), parameters[index].shape):
                raise StateError(f"its optimizer's {key} of parameter {index} does not fit")
