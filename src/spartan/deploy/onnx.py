"""ONNX export of a pruned model, checked against ONNX Runtime."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from spartan.copies import copy_model
from spartan.deploy.comparison import relative_error, run_on_example
from spartan.deploy.inference_layers import InferenceLayer
from spartan.deploy.removing import purge_channels
from spartan.errors import DeployError, FileError, MissingExtraError
from spartan.files import write_atomically

# Relative error at which the file is refused. Ten times what our own kernels are allowed: other
# runtimes fuse layers and approximate GELU and exp. Narrower floats: this many units of rounding.
_TOLERANCE, _ROUNDINGS = 1e-4, 16


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        bytes: Its size.
        removed: Channels that were removed, by layer.
        error: Relative difference of ONNX Runtime's outputs and the model's.
        free: Dimensions of each input that may vary, besides the batch.
    """

    path: Path
    bytes: int
    removed: dict[str, int]
    error: float
    free: dict[str, list[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        gone = sum(self.removed.values())
        channels = f"{gone:,} zero channels of {len(self.removed)} layers removed; " if gone else ""
        others = [f"{name} {dims}" for name, dims in self.free.items() if dims]
        free = f"free batch and dimensions {', '.join(others)}" if others else "free batch"
        return (
            f"{self.path}: {self.bytes:,} bytes, {free}; {channels}ONNX Runtime agrees to "
            f"{self.error:.1e}. It multiplies zeros like other numbers; for speed from them, "
            "use spartan.accelerate."
        )


def export_onnx(
    model: nn.Module, example_input: Any, path: Path, *, purge: bool = True
) -> Exported:
    """Write a model, and run the file.

    The first dimension of the inputs, the batch, may vary; so may others where the model allows
    it, as the size of images or the length of texts. Both are tried out.

    Args:
        model: The model.
        example_input: One input: a tensor, a tuple of positional or a dict of keyword arguments.
        path: The file.
        purge: Whether to remove zero channels first; models that torch.fx cannot trace keep them.

    Raises:
        DeployError: The model cannot be exported, or only for one batch size, or ONNX Runtime's
            outputs differ.
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    runtime = _packages()
    if not path.absolute().parent.is_dir():
        raise FileError(f"There is no folder {str(path.parent)!r} to write {path.name!r} into.")
    if any(isinstance(module, InferenceLayer) for module in model.modules()):
        raise DeployError(
            "An accelerated model has kernels that ONNX does not know: export the model that was "
            "given to accelerate."
        )
    model = copy_model(model, DeployError).eval()
    example = _Example(model, example_input)
    removed: dict[str, int] = {}
    work = model
    if purge:
        with contextlib.suppress(DeployError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is not purged is exported as it is
            purged = purge_channels(model, example_input)
            work, removed = purged.model, purged.removed
    results: list[tuple[float, dict[str, list[int]], bool]] = []
    failures: list[DeployError] = []

    # Dimensions besides the batch may be what the model, ONNX or its runtime cannot vary, and a
    # purged model takes the arguments of the example alone.
    attempts = [(one, every) for one in (work, model) for every in (True, False)]

    def write(temporary: Path) -> None:
        for one, every in attempts if work is not model else attempts[:2]:
            try:
                _export(one, example, temporary, every)
                results.append((*_check(runtime, temporary, example), one is work))
                return
            except DeployError as error:
                failures.append(error)
        raise failures[-1]

    write_atomically(path, write)
    error, free, purged_one = results[0]
    return Exported(path, path.stat().st_size, removed if purged_one else {}, error, free)


class _Example:
    """An example input with a batch of two or more, which no exporter takes for a constant.

    Attributes:
        args: Positional arguments.
        kwargs: Arguments by name.
        given: Both, as they were given.
        free_sizes: Of dimensions after the first: those that the model also takes twice as large,
            in all inputs at a time, as images of other sizes or longer texts.

    Raises:
        DeployError: The model does not run on it, or ONNX Runtime has no such numbers.
    """

    def __init__(self, model: nn.Module, example_input: Any) -> None:
        example_input = copy.deepcopy(example_input)
        self._model = model
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        if isinstance(example_input, Mapping):
            self.kwargs = dict(example_input)
        elif isinstance(example_input, tuple | list):
            self.args = tuple(example_input)
        else:
            self.args = (example_input,)
        self.given = self.args, self.kwargs
        self.run(*self.given)
        if any(x.dtype is torch.bfloat16 for x in (*self._tensors(), *model.parameters())):
            raise DeployError(
                "ONNX Runtime computes nothing in bfloat16 on a CPU, so the file could not be "
                "checked: export model.float() with an example in float32."
            )
        if self.batch < 1:
            raise DeployError("The example input is an empty batch: give one with samples.")
        if self.batch < 2:
            self.args, self.kwargs = self.with_sizes(lambda _, i: 2 if i == 0 else None)
        sizes = {n for x in self._tensors() for n in x.shape[1:] if n > 1}
        self.free_sizes = {n for n in sizes if self._runs_with({n})}
        if self.free_sizes and not self._runs_with(self.free_sizes):
            self.free_sizes = set()

    @property
    def batch(self) -> int:
        """The size of the first dimension of the first input."""
        sizes = [len(x) for x in self._tensors() if x.dim()]
        if not sizes:
            raise DeployError("The example input has no tensor with a batch dimension.")
        return sizes[0]

    def run(self, args: Any, kwargs: Any) -> list[Tensor]:
        """Return the tensors that the model returns for some arguments."""
        call = lambda *values: self._model(*values[0], **values[1])  # noqa: E731
        with torch.inference_mode():
            outputs = run_on_example(call, (args, kwargs))  # type: ignore[arg-type]
        return [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]

    def with_sizes(self, size: Callable[[Tensor, int], int | None]) -> tuple[Any, Any]:
        """Return arguments whose tensors are repeated and cut to other sizes.

        Args:
            size: Maps a tensor and one of its dimensions to a size; None leaves it.
        """

        def sized(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            y = x
            for i in range(x.dim()):
                wanted = size(x, i) if i or len(x) == self.batch else None
                if wanted is not None:
                    times = -(-wanted // x.shape[i])
                    y = torch.cat([y] * times, i).narrow(i, 0, wanted)
            return y

        return tree_map(sized, self.args), tree_map(sized, self.kwargs)

    def larger(self) -> tuple[Any, Any]:
        """Return arguments in which all free dimensions are twice as large."""
        return self._doubled(self.free_sizes)

    def is_free(self, x: Tensor, i: int) -> bool:
        """Whether a dimension of an input may vary, besides the batch."""
        return i > 0 and x.shape[i] in self.free_sizes

    def _doubled(self, sizes: set[int]) -> tuple[Any, Any]:
        return self.with_sizes(lambda x, i: 2 * x.shape[i] if i and x.shape[i] in sizes else None)

    def _runs_with(self, sizes: set[int]) -> bool:
        try:
            self.run(*self._doubled(sizes))
        except DeployError:
            return False
        return True

    def dynamic_shapes(self, every_dimension: bool) -> tuple[Any, ...] | dict[str, Any]:
        """Return what torch.export is to leave free."""
        free, other = torch.export.Dim.DYNAMIC, torch.export.Dim.AUTO
        batch = self.batch

        def dims(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return None
            rest = {i: other for i in range(x.dim()) if every_dimension and self.is_free(x, i)}
            return {**({0: free} if x.dim() and len(x) == batch else {}), **rest}

        if self.args:
            return tuple(tree_map(dims, arg) for arg in self.args)
        return {name: tree_map(dims, value) for name, value in self.kwargs.items()}

    def _tensors(self) -> Iterator[Tensor]:
        yield from (x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor))


def _packages() -> Any:
    try:
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingExtraError(
            f"Exporting needs {error.name}: pip install 'spartan-torch[onnx]'."
        ) from error


def _export(model: nn.Module, example: _Example, path: Path, every_dimension: bool) -> None:
    shapes = example.dynamic_shapes(every_dimension)
    with _quiet(), torch.no_grad():
        try:
            program = torch.export.export(
                model, example.args, example.kwargs, dynamic_shapes=shapes, strict=False
            )
            _refuse_ranges(program)
            torch.onnx.export(program, (), path, dynamo=True, external_data=False, verbose=False)
        except DeployError:
            raise
        except Exception as error:
            # The exporter runs the user's code on stand-ins: whatever it raises, it cannot.
            raise DeployError(f"torch cannot export this model: {_sentence(error)}") from error


def _refuse_ranges(program: Any) -> None:
    """Refuse sizes that are free in a part of what they could be: the model branches on them."""
    for symbol, allowed in program.range_constraints.items():
        low, high = int(allowed.lower), str(allowed.upper)  # "int_oo" is infinite
        # torch.export takes sizes of 0 and 1 for constants; batches of 1 are tried out.
        if low > 2 or (high.isdigit() and int(high) < 1 << 31):
            raise DeployError(
                f"The model takes another way where a size ({symbol}) is not from {low} to {high}, "
                "and a file holds one way only."
            )


def _sentence(error: Exception) -> str:
    text = str(error)
    if "specialized" in text or "Constraints violated" in text:
        return (
            "it takes the batch size for a constant. Write x.shape[0] instead of len(x), and no "
            "int() or .item() around it."
        )
    unknown = re.search(r"Found <class '([^']+)'> in output", text)
    if unknown:
        return (
            f"it returns a {unknown[1].rpartition('.')[2]}, which torch.export does not know. "
            "Leave it out: for a cache of transformers, give use_cache=False with the example."
        )
    while error.__cause__ is not None:  # the exporter wraps what happened in advice
        error = error.__cause__  # type: ignore[assignment]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's progress, and which of its optional packages it lacks."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx")]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _check(runtime: Any, path: Path, example: _Example) -> tuple[float, dict[str, list[int]]]:
    """Compare the file with the model: on the example, another batch, and other sizes.

    Returns:
        The largest relative error, and the dimensions of each input that may vary.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors; its warnings are about names of dimensions
    try:
        session = runtime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    except Exception as error:
        raise DeployError(f"ONNX Runtime cannot open the file: {_sentence(error)}") from error
    inputs = session.get_inputs()
    fixed = [i.name for i in inputs if i.shape and i.shape[0] == example.batch]
    if fixed:
        raise DeployError(
            f"The file would take batches of {example.batch} only: the model fixes the batch size "
            f"of {fixed[0]!r} somewhere, as by len(x), int() or .item(). Use x.shape[0]."
        )
    free = {
        i.name: [k for k, size in enumerate(i.shape) if k and isinstance(size, str)] for i in inputs
    }
    variants = [example.given, (example.args, example.kwargs)]
    variants += [
        example.with_sizes(partial(_batch_of, size))
        for size in (1, example.batch + 1, 4 * example.batch)
    ]
    if any(free.values()):
        variants.append(example.larger())
    return max(_error(session, inputs, example, *variant) for variant in variants), free


def _batch_of(size: int, _: Tensor, dimension: int) -> int | None:
    return None if dimension else size


def _error(session: Any, inputs: Any, example: _Example, args: Any, kwargs: Any) -> float:
    try:
        expected = example.run(args, kwargs)
    except DeployError:
        return 0.0  # the model itself does not take it
    # By name where they have one: a purged model has its arguments in the order of the signature.
    tensors = iter([x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)])
    named = {name: x for name, x in kwargs.items() if isinstance(x, Tensor)}
    feed = {
        i.name: (named[i.name] if i.name in named else next(tensors)).cpu().numpy() for i in inputs
    }
    try:
        outputs = session.run(None, feed)
    except Exception as failure:
        raise DeployError(f"ONNX Runtime cannot run the file: {_sentence(failure)}") from failure
    found = [torch.from_numpy(output) for output in outputs]
    error = relative_error(found, [x.cpu() for x in expected])
    eps = max((torch.finfo(x.dtype).eps for x in expected if x.is_floating_point()), default=0.0)
    if not error <= max(_TOLERANCE, _ROUNDINGS * eps):
        raise DeployError(f"ONNX Runtime's outputs differ by {error:.1e}; no file was written.")
    return error
