"""How many steps of a distillation fit a time."""

from __future__ import annotations

import dataclasses
import time

from spartan.budget import Budget
from spartan.methods.base import Method
from spartan.post_training.distillation import Distillation, distil
from spartan.post_training.network import Network

_TRIAL = 4  # steps that are timed, after a step that is not
_RESERVE = 0.92  # of the time is planned


def steps_within(
    network: Network, method: Method, budget: Budget, how: Distillation, seconds: float
) -> int:
    """Return how many steps of a distillation take so long on this machine, at least 1.

    A few steps of a copy are timed, so that two runs may answer differently.
    """
    model, _ = network.scratch()
    clock: list[float] = []
    trial = dataclasses.replace(network, tick=lambda *_: clock.append(time.perf_counter()))
    began = time.perf_counter()
    distil(trial, model, method, budget, dataclasses.replace(how, steps=_TRIAL + 1))
    each = (clock[-1] - clock[0]) / _TRIAL
    spent = time.perf_counter() - began
    return max(1, int((_RESERVE * seconds - spent) / each))
