r"""Network-wise reconstruction: distils the dense network's outputs into the pruned one.

    L = T² KL(softmax(z₀ / T) ‖ softmax(z / T))     logits z of the pruned, z₀ of the dense one

averaged over samples (and tokens), or the mean squared error relative to the spread of the dense
outputs where those are no logits. Labels are not used; dropout is off. While masks move, batch
norms use the statistics of their batch, and learn their running ones; with fixed masks, whose
layers were solved for the running ones, they keep these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spartan.budgets.budget import Budget
from spartan.errors import CalibrationError, MethodError, NonFiniteError
from spartan.example_inputs import run_on, run_on_copy, tensors_of
from spartan.methods.masking.contract import MaskingMethod
from spartan.post_training.calibration import Calibration
from spartan.post_training.network import Network
from spartan.seeds import derive_seed
from spartan.sparsifier.sparsifier import Sparsifier
from spartan.teachers import divergence

Augment = Callable[[Any, torch.Generator], Any]

# Of outputs of the dense network, 256 MiB: larger ones (tokens x vocabulary) are computed again.
_KEPT_BYTES = 1 << 28
# Intervals between evaluations on the held-out samples, from the first step at the budget to the
# last: nine evaluations, each of which costs a pass and may find a better snapshot.
_CHECKS = 8


@dataclass(frozen=True)
class Distillation:
    """How the pruned network learns from the dense one.

    Attributes:
        steps: Optimizer steps (Adam, one twentieth of warm-up, then cosine to 0).
        batch_size: Samples of a step.
        lr: Peak learning rate; None: 3e-3 for networks with batch norms, 5e-4 for others.
        temperature: T.
        loss: `"kl"` on logits (which an offset common to all classes does not change), `"mse"` on
            all outputs, as for regression, or `"auto"`: the first where the output is a matrix of
            several columns or has `logits`.
        augment: Changes a batch of inputs with random numbers from a generator; both networks see
            the result. Optional.

    Raises:
        MethodError: A setting is out of range.
    """

    steps: int = 600
    batch_size: int = 64
    lr: float | None = None
    temperature: float = 4.0
    loss: Literal["auto", "kl", "mse"] = "auto"
    augment: Augment | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise MethodError(
                f"steps={self.steps} and batch_size={self.batch_size} must be at least 1."
            )
        if not (self.lr is None or self.lr > 0) or not self.temperature > 0:
            raise MethodError(f"lr={self.lr} and temperature={self.temperature} must be positive.")
        if self.loss not in ("auto", "kl", "mse"):
            raise MethodError(f"loss={self.loss!r} must be 'auto', 'kl' or 'mse'.")

    def divergence(self, output: Any, wanted: Any) -> Tensor:
        """Return how far an output is from the dense network's."""
        ours, theirs = _logits(output), _logits(wanted)
        if self.loss == "kl" or (self.loss == "auto" and ours is not None):
            if ours is None or theirs is None:
                ours, theirs = next(_tensors(output)), next(_tensors(wanted))
            return divergence(ours, theirs, self.temperature)
        pairs_of = list(zip(_tensors(output), _tensors(wanted), strict=True))
        errors = [
            F.mse_loss(a.float(), b.float()) / b.float().var(correction=0).clamp_min(1e-12)
            for a, b in pairs_of
        ]
        return torch.stack(errors).mean()

    def check(self, output: Any) -> None:
        """Raise `CalibrationError` unless networks can be compared by such outputs."""
        found = list(_tensors(output))
        if not found or not found[0].is_floating_point():
            raise CalibrationError(
                f"The model returns {type(output).__name__}, in which there is no floating-point "
                "tensor to compare: tensors, and dicts, lists, tuples or dataclasses of them can "
                "be."
            )
        try:
            self.divergence(output, output)
        except (IndexError, RuntimeError) as error:
            raise CalibrationError(
                f"Outputs of shape {tuple(found[0].shape)} have no {self.loss!r} loss: {error}"
            ) from error

    def loss_on(self, model: nn.Module, references: References) -> float:
        """Return the mean divergence of a model, in evaluation mode, from what it should answer."""
        model.eval()
        total, samples = 0.0, 0
        with torch.no_grad():
            for batch, wanted in references:
                count = len(next(_tensors(batch)))
                total += count * float(self.divergence(run_on_copy(model, batch), wanted))
                samples += count
        return total / samples


class References:
    """Batches, and what the dense network answers; kept where that takes little memory.

    Args:
        dense: The dense network.
        samples: The samples.
        batch_size: Samples of a batch.
    """

    def __init__(self, dense: nn.Module, samples: Calibration, batch_size: int) -> None:
        self._dense, self._batches = dense, samples.batches(batch_size)
        self._known: list[Any] | None = None

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        if self._known is not None:
            yield from zip(self._batches, self._known, strict=True)
            return
        known, size = [], 0
        for batch in self._batches:
            with torch.no_grad():
                wanted = run_on_copy(self._dense, batch)
            size += sum(t.numel() * t.element_size() for t in _tensors(wanted))
            if size <= _KEPT_BYTES:
                known.append(wanted)
            yield batch, wanted
        if len(known) == len(self._batches):
            self._known = known


@dataclass
class Trained:
    """What came of a distillation.

    Attributes:
        rows: Step, loss, density and, where it was looked at, held-out loss.
        step: Step of the weights that were taken: those of the smallest held-out loss.
        loss: That loss.
    """

    rows: list[dict[str, float]]
    step: int
    loss: float


def distil(
    network: Network, model: nn.Module, method: MaskingMethod, budget: Budget, how: Distillation
) -> Trained:
    """Train a copy of the dense model at a budget, and leave it at its best.

    Args:
        network: Where the dense model and the samples are.
        model: The copy; in the end it holds the weights of the smallest loss on held-out samples,
            among those at the budget.
        method: What keeps it at the budget.
        budget: The budget.
        how: How it learns.

    Raises:
        NonFiniteError: The loss is NaN or infinite.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    if any(p.dtype == torch.float16 for p in parameters):
        raise MethodError(
            "A model in float16 cannot be distilled: its optimizer underflows. Convert it first, "
            "with model.float() or model.bfloat16(), or use a method that solves layers."
        )
    for parameter in parameters:
        parameter.requires_grad_(True)  # also what was frozen: everything makes up for the pruning
    optimizer = torch.optim.Adam(parameters, lr=_peak(how, model))
    peak = optimizer.param_groups[0]["lr"]
    names = [weight.name for weight in network.weights]
    sparsifier = Sparsifier(
        model, optimizer, method, budget, how.steps, network.pattern, include=names
    )
    generator = torch.Generator().manual_seed(derive_seed(network.seed, "distillation", 0))
    moving = method.finds_masks
    looks = _looks(method, how.steps)
    held_out = References(network.dense, network.held_out, how.batch_size)
    rows: list[dict[str, float]] = []
    best: tuple[float, int, dict[str, Tensor]] | None = None

    def look(step: int) -> None:
        nonlocal best
        loss = how.loss_on(model, held_out)
        if math.isnan(loss):
            raise NonFiniteError(
                f"The loss on held-out samples is NaN at step {step}: give a smaller lr, or look "
                "for outputs of the dense model that are infinite."
            )
        rows[-1]["held_out"] = loss
        if best is None or loss < best[0]:
            state = {k: v.detach().clone() for k, v in model.state_dict().items()}
            best = loss, step, state

    try:
        rows.append({"step": 0, "density": sparsifier.density})
        if 0 in looks:
            look(0)
        for step, batch in zip(
            range(1, how.steps + 1), network.fit.shuffled(how.batch_size, generator), strict=False
        ):
            optimizer.param_groups[0]["lr"] = peak * _factor(step - 1, how.steps)
            if how.augment is not None:
                batch = how.augment(batch, generator)
            loss = _step(model, network.dense, batch, optimizer, how, moving)
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"The loss is {loss} at step {step} of the distillation: give a smaller lr."
                )
            rows.append({"step": step, "loss": loss, "density": sparsifier.density})
            if step in looks:
                look(step)
            network.tick("distillation", step, how.steps)
    finally:
        model.eval()
    sparsifier.finalize()
    assert best is not None
    model.load_state_dict(best[2])
    return Trained(rows, best[1], best[0])


def _step(
    model: nn.Module,
    dense: nn.Module,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    how: Distillation,
    moving: bool,
) -> float:
    several = len(next(_tensors(batch))) > 1  # one sample has no statistics
    for module in model.modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        module.training = moving and several and norm
    with torch.no_grad():
        wanted = run_on_copy(dense, batch)
    optimizer.zero_grad()
    loss = how.divergence(run_on(model, batch), wanted)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _looks(method: MaskingMethod, steps: int) -> set[int]:
    """Return the steps after which the held-out samples are looked at; the last is one."""
    first = next((s for s in range(steps + 1) if method.progress(s, steps) >= 1.0), steps)
    return {round(first + (steps - first) * i / _CHECKS) for i in range(_CHECKS + 1)}


def _factor(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / max(1.0, steps / 20))
    return warm * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _peak(how: Distillation, model: nn.Module) -> float:
    if how.lr is not None:
        return how.lr
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    return 3e-3 if norms else 5e-4


def _logits(output: Any) -> Tensor | None:
    named = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    matrix = isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1
    return output if matrix else None


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in a value; of inputs without any, all tensors."""
    found = list(tensors_of(value))
    yield from [t for t in found if t.is_floating_point()] or found
