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


def lines(**changed: Any) -> Any:
    named = {
        "starts": torch.tensor([0, 2, 3], dtype=torch.int32),
        "others": torch.tensor([0, 2, 1], dtype=torch.int32),
        "order": None,
        "ends": 3,
        "blocks": 1,
        "threads": 1,
    }
    return native.ConnectionLines(**(named | changed))


def forward(**changed: Any) -> None:
    named = {"lines": lines(), "values": torch.ones(3), "bias": None, "threads": 1}
    named |= {"x": torch.ones(1, 3, 4), "y": torch.zeros(1, 2, 4)}
    native.connections_forward(**(named | changed))


def backward(**changed: Any) -> None:
    named = {"lines": lines(order=torch.arange(3, dtype=torch.int32)), "values": torch.ones(3)}
    named |= {"x": torch.ones(1, 2, 4), "dy": torch.ones(1, 3, 4), "dx": torch.zeros(1, 2, 4)}
    native.connections_backward(**(named | {"dvalues": torch.zeros(3), "threads": 1} | changed))


def transpose(**changed: Any) -> None:
    named = {
        "starts": torch.tensor([0, 2, 3], dtype=torch.int32),
        "others": torch.tensor([0, 2, 1], dtype=torch.int32),
        "column_starts": torch.zeros(4, dtype=torch.int32),
        "column_lines": torch.zeros(3, dtype=torch.int32),
        "order": torch.zeros(3, dtype=torch.int32),
    }
    native.connections_transpose(**(named | changed))


def blocked(**changed: Any) -> Any:
    named = {
        "values": torch.ones(2, 1),
        "offsets": torch.tensor([0, 16], dtype=torch.int16),
        "starts": torch.tensor([0, 1, 2], dtype=torch.int32),
        "bases": torch.zeros(1, dtype=torch.int64),
        "bias": torch.zeros(2),
        "bundles": 2,
        "outputs": 2,
        "height": 1,
    }
    return native.BlockedWeights(**(named | changed))


def linear(**changed: Any) -> None:
    named = {"weights": blocked(), "x": torch.ones(5, 2), "y": torch.zeros(5, 2), "addend": None}
    named |= {"inputs": 2, "feature_major": False, "lanes": 16, "activation": 0, "threads": 1}
    native.linear(**(named | changed))


def sizes(**changed: Any) -> Any:
    pairs = {"out": (4, 4), "kernel": (1, 1), "stride": (1, 1), "padding": (0, 0)}
    named = {"channels": 2, "rows": 4, "images": 1, "columns": 4, "dilation": (1, 1)}
    return native.Convolution(**(named | pairs | {"group": 1, "height": 4} | changed))


def convolution(**changed: Any) -> None:
    weights = blocked(offsets=torch.tensor([0, 16], dtype=torch.int16))
    named = {"weights": weights, "sizes": sizes(), "addend": None, "lanes": 16, "activation": 0}
    named |= {"x": torch.ones(1, 2, 4, 4), "y": torch.zeros(1, 2, 4, 4), "threads": 1}
    native.convolution(**(named | changed))


def pool(**changed: Any) -> None:
    named = {"grid": [4, 6, 1, 2, 3, 1, 2, 1, 1], "x": torch.ones(4, 6), "y": None}
    native.pool_units(**(named | {"units": torch.zeros(2, 2), "threads": 1} | changed))


def scan(**changed: Any) -> None:
    named = {"tensors": [torch.ones(5)], "scales": [1.0], "costs": [1.0], "absolute": True}
    named |= {"budget": 2.0, "bracket": (0.0, 0.0), "dual": None, "dropped": False, "counted": True}
    named |= {"threads": 1}
    native.scan(**(named | changed))


def mix(**changed: Any) -> None:
    named = {"of_parents": torch.ones(5, 3), "of_children": torch.ones(5, 6)}
    named |= {"weights": torch.ones(5, 6), "chosen": 2, "temperature": 1.0, "threads": 1}
    native.mix(**(named | changed))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


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
        (lines, "starts", ints(0, 9, 3), "starts must rise"),
        (lines, "starts", ints(), "starts must rise"),
        (lines, "others", ints(0, 3, 1), "others has an index that is out of range"),
        (lines, "others", ints(0, -1, 1), "others has an index that is out of range"),
        (lines, "order", ints(0, 1, 7), "order has an index that is out of range"),
        (lines, "order", ints(0, 1), "order has 2 entries, not 3"),
        (lines, "blocks", 0, "blocks must be at least 1"),
        (forward, "values", torch.ones(4), "values has 4 entries, not 3"),
        (forward, "x", torch.ones(1, 2, 4), "x has another shape"),
        (forward, "y", torch.ones(1, 4, 2).transpose(1, 2), "y must have neighbouring samples"),
        (forward, "x", torch.ones(3, 4).to_sparse_csr(), "x must"),
        (backward, "dvalues", torch.ones(2), "dvalues has 2 entries, not 3"),
        (transpose, "starts", ints(), "starts must rise"),
        (transpose, "others", ints(0, 3, 1), "others has an index that is out of range"),
        (transpose, "column_starts", ints(0, 0, 0), "others has an index that is out of range"),
        (transpose, "order", ints(0), "order has 1 entries, not 3"),
        (blocked, "bases", torch.tensor([-1]), "bases must not be negative"),
        (blocked, "starts", ints(0, 2, 1), "starts must rise"),
        (blocked, "starts", ints(0, 1, 3), "starts must rise"),
        (blocked, "values", torch.ones(3, 1), "values has 3 entries, not 2"),
        (blocked, "bias", torch.zeros(1), "bias has 1 entries, not 2"),
        (blocked, "outputs", 3, "outputs must not be more"),
        (blocked, "height", 5, "height must be 1, 4, 8 or 16"),
        (linear, "x", torch.ones(5, 3), "x must be (samples, inputs)"),
        (linear, "x", torch.ones(5, 4)[:, ::2], "x must have a stride of 1"),
        (linear, "y", torch.zeros(2, 5).t(), "y lies in another memory order"),
        (linear, "y", torch.zeros(1, 2).expand(5, 2), "y lies in another memory order"),
        (linear, "addend", torch.zeros(2, 5).t(), "addend must lie in memory as y does"),
        (linear, "lanes", 0, "lanes must be a multiple of 16"),
        (linear, "weights", blocked(bases=torch.tensor([16])), "weights read inputs"),
        (sizes, "group", 0, "sizes must be positive"),
        (sizes, "stride", (0, 1), "sizes must be positive"),
        (sizes, "padding", (-1, 0), "padding must not be negative"),
        (sizes, "kernel", (1, 1, 1), "sizes must be two numbers each"),
        (convolution, "x", torch.ones(1, 3, 4, 4), "x has another shape"),
        (convolution, "weights", blocked(bases=torch.tensor([16])), "weights read inputs"),
        (convolution, "lanes", -16, "lanes must be a multiple of 16"),
        (pool, "units", torch.zeros(5), "units has 5 entries, not 4"),
        (pool, "grid", [4, 6, 1, 2, 3, 1, 9, 1, 1], "grid must lead to its units"),
        (pool, "grid", [4, 6, 1, 3, 3, 1, 2, 1, 1], "grid must divide the weight"),
        (pool, "grid", [4, 6], "grid must have nine numbers"),
        (scan, "tensors", [], "tensors must not be empty"),
        (scan, "costs", [], "costs must have one entry for each tensor"),
        (mix, "chosen", 4, "chosen must be a number of parents"),
        (mix, "of_children", torch.ones(5, 7), "of_children must be (positions"),
        (mix, "weights", torch.ones(6, 5).t(), "weights must lie as of_children"),
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
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.finite(tensors=[torch.zeros(3)], threads=0)


def test_slices_hold_every_output() -> None:
    with pytest.raises(ValueError, match="^outputs must not be more"):
        native.SlicedWeights(
            values=torch.ones(16),
            columns=torch.zeros(16, dtype=torch.int16),
            starts=ints(0, 1),
            rows=torch.arange(16, dtype=torch.int32),
            bias=torch.zeros(100),
            inputs=3,
            outputs=100,
        )


def test_gradients_need_an_order() -> None:
    with pytest.raises(ValueError, match="^lines must have an order"):
        backward(lines=lines())


def test_tensors_of_a_generator_are_kept_while_they_are_read() -> None:
    assert native.finite(tensors=(torch.zeros(1000) for _ in range(50)), threads=2) == [True] * 50


def test_inputs_are_not_changed_by_a_refused_call() -> None:
    weights = [torch.ones(4, 6)]
    with pytest.raises(ValueError, match="^masks"):
        project(weights=weights, masks=[torch.ones(3, 3, dtype=torch.bool)])
    assert weights[0].eq(1).all()


def test_the_stub_says_what_the_module_has() -> None:
    """The build makes `_native.pyi`; the copy that mypy reads must be the same program."""
    installed = Path(module.__file__ or "").with_name("_native.pyi").read_text(encoding="utf-8")
    assert ast.dump(ast.parse(COPY.read_text(encoding="utf-8"))) == ast.dump(ast.parse(installed))
