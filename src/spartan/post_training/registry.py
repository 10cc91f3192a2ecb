"""The methods of compression by name."""

from __future__ import annotations

from typing import Any

from spartan.errors import MethodError, did_you_mean
from spartan.methods.base import Method
from spartan.methods.fcpts import FCPTS
from spartan.methods.fcpts_published import PublishedFCPTS
from spartan.post_training.base import LayerMethod
from spartan.post_training.magnitude import Magnitude
from spartan.post_training.obs import OBS
from spartan.post_training.sparsegpt import SparseGPT
from spartan.post_training.wanda import Wanda

METHODS: dict[str, type[LayerMethod] | type[Method]] = {
    cls.name: cls for cls in (FCPTS, PublishedFCPTS, OBS, SparseGPT, Wanda, Magnitude)
}
BEST = "best"


def create(name: str, **settings: Any) -> LayerMethod | Method:
    """Make a method by its name.

    Raises:
        MethodError: There is no such method.
    """
    if name not in METHODS:
        raise MethodError(f"Unknown method {name!r}; {did_you_mean(name, [*METHODS, BEST])}")
    return METHODS[name](**settings)
