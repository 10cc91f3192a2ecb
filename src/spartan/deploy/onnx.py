"""ONNX export of a pruned model, checked against ONNX Runtime."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spartan.deploy.purging import purge_channels
from spartan.errors import DeployError, MissingExtraError
from spartan.files import write_atomically

# Relative error at which the file is refused. Ten times what our own kernels are allowed: other
# runtimes fuse layers and approximate GELU and exp.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        bytes: Its size.
        removed: Channels that were removed, by layer.
        error: Relative difference of ONNX Runtime's output and the model's.
    """

    path: Path
    bytes: int
    removed: dict[str, int]
    error: float

    def __str__(self) -> str:
        gone = sum(self.removed.values())
        channels = f"{gone:,} zero channels of {len(self.removed)} layers removed; " if gone else ""
        return (
            f"{self.path}: {self.bytes:,} bytes; {channels}ONNX Runtime agrees to "
            f"{self.error:.1e}. It multiplies zeros like other numbers; for speed from them, "
            "use spartan.accelerate."
        )


def export_onnx(
    model: nn.Module, example_input: Tensor, path: Path, *, purge: bool = True
) -> Exported:
    """Write a model of one tensor to another, and run the file.

    The first dimension, the batch, may vary.

    Args:
        model: The model.
        example_input: One input.
        path: The file.
        purge: Whether to remove zero channels first; models that torch.fx cannot trace keep them.

    Raises:
        DeployError: The model cannot be exported, or ONNX Runtime's output differs.
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    runtime = _packages()
    model = copy.deepcopy(model).eval()
    removed: dict[str, int] = {}
    work = model
    if purge:
        with contextlib.suppress(DeployError):
            purged = purge_channels(model, example_input)
            work, removed = purged.model, purged.removed
    with torch.inference_mode():
        expected = model(example_input)
    if not isinstance(expected, Tensor):
        raise DeployError(
            f"The model returns {type(expected).__name__}; only a tensor can be told."
        )
    errors: list[float] = []

    def write(temporary: Path) -> None:
        _export(work, example_input, temporary)
        errors.append(_check(runtime, temporary, example_input, expected))

    write_atomically(path, write)
    return Exported(path, path.stat().st_size, removed, errors[0])


def _packages() -> object:
    try:
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingExtraError(
            f"Exporting needs {error.name}: pip install 'spartan-torch[onnx]'."
        ) from error


def _export(model: nn.Module, example_input: Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    # The exporter prints its progress, and logs which of its own optional packages are missing.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            # A batch of one would be taken for a constant.
            twice = torch.cat([example_input, example_input])
            batch_of_two = example_input if len(example_input) > 1 else twice
            torch.onnx.export(
                model,
                (batch_of_two,),
                path,
                dynamo=True,
                external_data=False,
                dynamic_shapes=({0: batch},),
                verbose=False,
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise DeployError(
                f"torch cannot export this model: {type(error).__name__} {reason}"
            ) from error
        finally:
            logger.setLevel(level)


def _check(runtime: object, path: Path, example_input: Tensor, expected: Tensor) -> float:
    session = runtime.InferenceSession(  # type: ignore[attr-defined]
        str(path), providers=["CPUExecutionProvider"]
    )
    (output,) = session.run(None, {session.get_inputs()[0].name: example_input.numpy()})
    difference = (torch.from_numpy(output).double() - expected.double()).norm()
    error = float(difference / expected.double().norm().clamp_min(1e-30))
    if not error <= _TOLERANCE:
        raise DeployError(f"ONNX Runtime's output differs by {error:.1e}; no file was written.")
    return error
