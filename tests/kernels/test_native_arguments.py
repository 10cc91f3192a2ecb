"""What the native kernels refuse before they touch memory, and what mypy is told of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

module = pytest.importorskip("spartan.kernels._native", reason="no native kernels here")
native = module.Kernels
COPY = Path(__file__).parents[2] / "src" / "spartan" / "kernels" / "_native.pyi"


def project(**changed: Any) -> None:
    named = {
        "thetas": [torch.randn(4, 6)],
        "latents": [torch.zeros(4, 6)],
        "weights": [torch.zeros(4, 6)],
        "masks": [torch.zeros(4, 6, dtype=torch.bool)],
        "scales": [1.0],
        "thresholds": [0.5],
        "tie_ends": [0],
        "duals": None,
        "threads": 1,
    }
    native.project(**(named | changed))


def sliced_vector(**changed: Any) -> None:
    weights = native.SlicedWeights(
        values=torch.ones(16),
        columns=torch.zeros(16, dtype=torch.int16),
        starts=torch.tensor([0, 1], dtype=torch.int32),
        rows=torch.arange(16, dtype=torch.int32),
        bias=torch.zeros(16),
        inputs=3,
        outputs=16,
    )
    named = {"x": torch.ones(3), "y": torch.zeros(16), "addend": None, "activation": 0}
    native.vector(**({"weights": weights, "threads": 1} | named | changed))


def gaps() -> Tensor:
    return torch.zeros(4, 12)[:, ::2]


@pytest.mark.parametrize(
    ("call", "argument", "given", "message"),
    [
        (project, "weights", [torch.zeros(4, 6).double()], "weights 0: must be a tensor of torch."),
        (project, "masks", [torch.zeros(4, 6)], "masks 0: must be a tensor of torch.bool"),
        (project, "weights", ["a word"], "weights 0: must be a tensor of torch.float32"),
        (project, "weights", [torch.zeros(4, 5)], "weights has other sizes"),
        (project, "weights", [], "weights has other sizes"),
        (project, "weights", [torch.zeros(6, 4).t()], "weights lies in another memory order"),
        (project, "weights", [gaps()], "weights 0: must fill its memory without gaps"),
        (project, "weights", [torch.zeros(4, 6, device="meta")], "weights 0: must be on the CPU"),
        (project, "scales", [], "scales must have one entry for each tensor"),
        (project, "tie_ends", [1, 2], "tie_ends must have one entry for each tensor"),
        (project, "tie_ends", None, "tie_ends goes with thresholds"),
        (sliced_vector, "x", torch.ones(4), "x has 4 entries, not 3"),
        (sliced_vector, "y", torch.zeros(32)[::2], "y must be contiguous"),
        (sliced_vector, "addend", torch.zeros(15), "addend has 15 entries, not 16"),
        (sliced_vector, "activation", 7, "activation must be 0, 1 or 2"),
    ],
)
def test_wrong_arguments_are_refused_by_name(
    call: Callable[..., None], argument: str, given: Any, message: str
) -> None:
    call()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call(**{argument: given})


def test_arguments_cannot_be_swapped_by_place() -> None:
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.finite([torch.zeros(3)], 1)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.finite(tensors=1, threads=[torch.zeros(3)])


def test_weights_that_would_be_read_out_of_range_are_refused() -> None:
    good = {
        "values": torch.ones(2, 1),
        "offsets": torch.zeros(2, dtype=torch.int16),
        "starts": torch.tensor([0, 1, 2], dtype=torch.int32),
        "bases": torch.zeros(1, dtype=torch.int64),
        "bias": torch.zeros(2),
        "bundles": 2,
        "outputs": 2,
        "height": 1,
    }
    native.BlockedWeights(**good)
    for argument, given in [
        ("starts", torch.tensor([0, 2, 1], dtype=torch.int32)),
        ("starts", torch.tensor([0, 1, 3], dtype=torch.int32)),
        ("values", torch.ones(3, 1)),
        ("bias", torch.zeros(1)),
        ("outputs", 3),
        ("height", 5),
    ]:
        with pytest.raises(ValueError, match=f"^{argument} "):
            native.BlockedWeights(**(good | {argument: given}))


def test_inputs_are_not_changed_by_a_refused_call() -> None:
    weights = [torch.ones(4, 6)]
    with pytest.raises(ValueError, match="^masks"):
        project(weights=weights, masks=[torch.ones(3, 3, dtype=torch.bool)])
    assert weights[0].eq(1).all()


def test_the_stub_says_what_the_module_has() -> None:
    """The build makes `_native.pyi`; the copy that mypy reads must be the same program."""
    installed = Path(module.__file__ or "").with_name("_native.pyi").read_text()
    assert ast.dump(ast.parse(COPY.read_text())) == ast.dump(ast.parse(installed))
