"""Which kernels run is visible, can be forced, and never falls back in silence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

from spartan import kernels
from spartan.errors import KernelError
from spartan.kernels import dispatch


def test_native_kernels_are_the_default() -> None:
    # CI builds them; a machine without a compiler may skip, visibly.
    if kernels.backend().name == "torch":
        pytest.skip(kernels.backend().reason)
    code = "import spartan.kernels; print(spartan.kernels.backend())"
    environment = {k: v for k, v in os.environ.items() if k != "SPARTAN_KERNELS"}
    chosen = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert chosen.stdout.startswith("native (")


@pytest.mark.parametrize(
    ("variable", "shown"), [("torch", "torch (asked for)"), ("baseline", "native (baseline)")]
)
def test_the_environment_forces_one(
    variable: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable != "torch" and kernels.backend().name == "torch":
        pytest.skip(kernels.backend().reason)
    monkeypatch.setenv("SPARTAN_KERNELS", variable)
    with kernels.using("torch"):  # puts back what ran before, its instruction set too
        dispatch._choice = None
        assert str(kernels.backend()) == shown


def test_an_unknown_one_is_refused_with_what_there_is() -> None:
    with pytest.raises(KernelError, match=r"SPARTAN_KERNELS=sse9.*torch"), kernels.using("sse9"):
        pass


def test_without_the_extension_torch_serves_and_says_why(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "spartan.kernels._native", None)
    monkeypatch.setattr(dispatch, "_choice", None)
    monkeypatch.delenv("SPARTAN_KERNELS", raising=False)
    assert kernels.backend().name == "torch"
    assert "not built" in kernels.backend().reason
    assert kernels.finite([torch.ones(3)]) == [True]
    with (
        pytest.raises(KernelError, match=r"not installed.*C\+\+ compiler"),
        kernels.using("native"),
    ):
        pass


def test_using_restores_what_ran_before() -> None:
    before = kernels.backend()
    with kernels.using("torch"):
        assert kernels.backend().name == "torch"
    assert kernels.backend() == before


def test_native_threads_are_those_of_torch() -> None:
    """The extension is linked to no OpenMP runtime of its own."""
    native = pytest.importorskip("spartan.kernels._native")
    if sys.platform != "linux":
        pytest.skip("reads the dynamic section with ldd")
    if shutil.which("ldd") is None:
        pytest.skip("ldd is not installed")
    linked = subprocess.run(["ldd", native.__file__], capture_output=True, text=True, check=True)
    assert "omp" not in linked.stdout
    assert dispatch._address_of_torch_openmp() != 0
