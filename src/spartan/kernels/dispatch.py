"""Chooses native kernels or their torch versions; `SPARTAN_KERNELS` forces one."""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from spartan.errors import KernelError
from spartan.kernels.memory import alike

if TYPE_CHECKING:
    from spartan.kernels._native import Kernels

Native: TypeAlias = "type[Kernels]"

VARIABLE = "SPARTAN_KERNELS"


@dataclass(frozen=True)
class Backend:
    """What serves contiguous float32 tensors on the CPU.

    Attributes:
        name: `"native"` or `"torch"`.
        instructions: Instruction set of the native loops: `"avx512"`, `"avx2"` or `"baseline"`.
        reason: Why the native kernels do not run; empty if they do.
    """

    name: str
    instructions: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.instructions or self.reason})"


def backend() -> Backend:
    """Say which kernels run.

    The environment variable `SPARTAN_KERNELS`, read once, forces one: `torch`, `native`, or one
    instruction set of the native kernels (`baseline`, `avx2`, `avx512`).

    Raises:
        KernelError: The variable asks for what is not there.
    """
    return _chosen()[0]


@contextmanager
def using(name: str) -> Iterator[None]:
    """Force a backend, in the words of `SPARTAN_KERNELS`, for the length of a with block."""
    global _choice
    before, _choice = _choice, _choose(name)
    try:
        yield
    finally:
        _choice = before
        if before is not None and before[1] is not None:
            before[1].use_instruction_set(before[0].instructions)


def native_for(*lists: Sequence[Tensor]) -> Native | None:
    """Return the native module if it serves all these tensors, else None.

    Args:
        lists: Lists of tensors, of one length or empty. Those at one place must be dense and have
            one memory order.
    """
    native = native_for_any_order(*(tensor for tensors in lists for tensor in tensors))
    given = [tensors for tensors in lists if tensors]
    return native if all(map(alike, zip(*given, strict=True))) else None


def native_module() -> Native | None:
    """Return the native module, or None if the torch versions run."""
    return _chosen()[1]


def native_for_any_order(*tensors: Tensor) -> Native | None:
    """Return the native module if these are float32 tensors on the CPU, else None."""
    native = native_module()
    for tensor in tensors:
        if (
            tensor.dtype is not torch.float32
            or tensor.device.type != "cpu"
            or type(tensor) not in (Tensor, nn.Parameter)
        ):
            return None
    return native


# Made at the first question, from the environment, and kept. `using` replaces it, and sets back the
# instruction set too, which is one for the whole process in the native module.
_choice: tuple[Backend, Native | None] | None = None


def _chosen() -> tuple[Backend, Native | None]:
    global _choice
    if _choice is None:
        _choice = _choose(os.environ.get(VARIABLE, ""))
    return _choice


def _choose(wanted: str) -> tuple[Backend, Native | None]:
    if wanted == "torch":
        return Backend("torch", reason="asked for"), None
    try:
        native: Native = importlib.import_module("spartan.kernels._native").Kernels
    except ModuleNotFoundError as error:
        if wanted:
            raise KernelError(
                f"{VARIABLE}={wanted} asks for the native kernels, which are not installed "
                f"({error}); install a C++ compiler and reinstall spartan-torch, or use torch."
            ) from error
        reason = "the native kernels were not built: no working C++ compiler when installed"
        return Backend("torch", reason=reason), None
    except ImportError as error:
        if wanted:
            raise KernelError(f"The native kernels cannot be loaded: {error}") from error
        return Backend("torch", reason=f"the native kernels cannot be loaded: {error}"), None
    known = native.instruction_sets()
    instructions = known[-1] if wanted in ("", "native") else wanted
    if instructions not in known:
        raise KernelError(
            f"{VARIABLE}={wanted}: this machine has torch, native, {', '.join(known)}."
        )
    native.use_instruction_set(instructions)
    native.use_runner(_address_of_torch_openmp())
    return Backend("native", instructions), native


def _address_of_torch_openmp() -> int:
    """Return the address of GOMP_parallel in the OpenMP runtime that torch uses, or 0.

    Symbols are looked up in what libtorch itself is linked to, so that a second OpenMP runtime in
    the process (of scikit-learn, say) is never taken for torch's.
    """
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        library = Path(torch.__file__).parent / "lib" / name
        if library.exists():
            try:
                address = ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p)
            except (OSError, AttributeError):
                return 0
            return address.value or 0
    return 0
