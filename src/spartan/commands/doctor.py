"""`spartan doctor`: what this machine can use, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from rich.table import Table

from spartan.commands.terminal.console import Terminal
from spartan.deploy.timing import BUSY, busy_cores
from spartan.kernels import backend

_OPTIONAL = {
    "tyro": "the command line: pip install 'spartan-torch[cli]'",
    "zstandard": "comparing packed files with zstd: pip install 'spartan-torch[cli]'",
    "onnx": "spartan export --onnx: pip install 'spartan-torch[onnx]'",
    "onnxruntime": "checking exported files: pip install 'spartan-torch[onnx]'",
    "datasets": "training on Hugging Face data: pip install 'spartan-torch[data]'",
}
_SEMI_STRUCTURED_SINCE = (8, 0)  # compute capability of the first GPUs with 2:4 tensor cores


@dataclass(frozen=True)
class Doctor:
    """Print what this machine can use, and what is missing."""

    def run(self) -> int:
        """Run the command."""
        table = Table("", "found", "advice", show_header=True)
        for finding in examine():
            table.add_row(finding.subject, finding.found, finding.advice)
        Terminal().print(table)
        return 0


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        subject: What was looked at.
        found: What was found.
        advice: What to do about it; empty if nothing.
    """

    subject: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at processor, kernels, threads, torch, GPU and optional packages."""
    return [
        Finding("processor", f"{_processor()}, {os.cpu_count()} cores"),
        Finding("instruction sets", ", ".join(_instruction_sets()) or "none with native kernels"),
        _kernels(),
        _threads(),
        _load(),
        Finding("torch", f"{torch.__version__}, {_math_library()}"),
        _gpu(),
        *_packages(),
    ]


def _kernels() -> Finding:
    chosen = backend()
    if chosen.name == "native":
        return Finding("kernels", f"native, {chosen.instructions}")
    if chosen.reason == "asked for":
        return Finding("kernels", "torch, asked for", "unset SPARTAN_KERNELS for the native ones")
    advice = "install a C++ compiler (g++ or clang) and reinstall spartan-torch: without the native"
    return Finding("kernels", str(chosen), f"{advice} kernels sparse layers seldom win")


def _threads() -> Finding:
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    advice = ""
    if threads > cores:
        advice = f"more threads than cores: set OMP_NUM_THREADS={cores}"
    waiting = os.environ.get("OMP_WAIT_POLICY", "default")
    return Finding("threads", f"{threads} of torch; OpenMP wait policy {waiting}", advice)


def _load() -> Finding:
    cores = busy_cores()
    quiet = cores < BUSY * (os.cpu_count() or 1)
    advice = "" if quiet else "timings will be off, and threads that spin make it worse"
    return Finding("other load", f"{cores:.1f} cores busy", advice)


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", "none that torch can use")
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    semi = "yes" if capability >= _SEMI_STRUCTURED_SINCE else "no"
    triton = "yes" if importlib.util.find_spec("triton") else "no"
    return Finding(
        "GPU",
        f"{name}, compute capability {capability[0]}.{capability[1]}; 2:4 tensor cores: {semi}; "
        f"Triton for block-sparse products: {triton}",
        "accelerate() has no GPU kernels: layers on a GPU stay dense",
    )


def _packages() -> list[Finding]:
    return [
        Finding(package, "not installed", f"needed for {purpose}")
        for package, purpose in _OPTIONAL.items()
        if importlib.util.find_spec(package) is None
    ]


def _instruction_sets() -> list[str]:
    try:
        native = import_module("spartan.kernels._native")
    except ImportError:
        return []
    names: list[str] = native.Kernels.instruction_sets()
    return names


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _math_library() -> str:
    mkl = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    onednn = "oneDNN" if torch.backends.mkldnn.is_available() else "no oneDNN"
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return f"{mkl}, {onednn}, {cuda}"
