"""`Trainer`: the training loop of `spartan train`, with sparsifier and checkpoints.

All randomness of a step is a function of the seed and the step, and of an epoch's order a function
of the seed and the epoch. A checkpoint therefore needs no generator state to resume exactly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from spartan.always_sparse.conversion import convert, sparse_layers, to_dense
from spartan.budgets.budget import Budget
from spartan.commands.accuracy import loss_and_accuracy, pick_device
from spartan.commands.images import ImageData, augment, batches, normalize
from spartan.commands.models import build_model, example_images
from spartan.commands.options.train import TrainConfig
from spartan.commands.runs.folder import Run
from spartan.commands.runs.interrupt import InterruptedRunError, SignalGuard
from spartan.commands.runs.metrics import MetricsLog, Row
from spartan.commands.train.resuming import described, refuse_another_run, refuse_misfit
from spartan.commands.train.teacher import find_teacher
from spartan.errors import ConfigError, StateError
from spartan.files import load_state, save_state, save_tensors
from spartan.methods.growth.contract import GrowthMethod
from spartan.methods.registry import AnyMethod
from spartan.norms import recalibrated
from spartan.seeds import derive_seed
from spartan.sparsifier.sparsifier import Sparsifier

_RECALIBRATED = 512  # training images that batch norms are measured on while masks move
_LOG_ROWS = 200  # training rows written over a whole run, at most one a step


class Trainer:
    """One training run.

    Args:
        config: All options.
        data: The images.

    Attributes:
        last_move: The last step after which masks or connections move.

    Raises:
        SpartanError: An option does not fit; nothing is written then.
    """

    def __init__(self, config: TrainConfig, data: ImageData) -> None:
        self.config = config
        self.data = data
        self.device = pick_device(config.device)
        self.steps_per_epoch = math.ceil(len(data.train.labels) / config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.step = 0
        self._described = described(config, data)

        torch.manual_seed(derive_seed(config.seed, "init", 0))
        self.model = build_model(config.model, data.channels, data.size, len(data.classes))
        self.model.to(self.device)
        self._check_model()
        self._teacher = find_teacher(config, data, self.device)
        method = config.make_method()
        budget = config.make_budget(example_images(data.channels, data.size, device=self.device))
        self._convert(method, budget)
        self.optimizer, self.peak_lr = make_optimizer(config, self.model)
        self.sparsifier = Sparsifier(
            self.model,
            self.optimizer,
            method,
            budget,
            self.total_steps,
            pattern=config.make_pattern(),
            checkpoint_with=None,  # checkpoints of a run have a place of their own for it
            **({} if isinstance(method, GrowthMethod) else self._filters()),
        )
        steps = range(self.total_steps + 1)
        self.last_move = max((s for s in steps if self.sparsifier.moves_after(s)), default=0)
        half = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        self._autocast = torch.autocast(self.device.type, half, enabled=config.amp)
        self._scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.amp and self.device.type == "cuda"
        )
        self._forward: Callable[[Tensor], Tensor] = (
            torch.compile(self.model) if config.compile else self.model
        )
        self._tally = torch.zeros(3, dtype=torch.float64)  # loss sum, correct, images
        self._selected_before = self.sparsifier.selected()

    def fit(self, run: Run, show: Callable[[Row], None], tick: Callable[[int, Row], None]) -> Row:
        """Train to the end and write the final model.

        Args:
            run: Folder to write to.
            show: Called with each row of the test split.
            tick: Called after each step with the step and the latest training row.

        Returns:
            The last row of the test split.

        Raises:
            InterruptedRunError: A signal came; a checkpoint is written.
        """
        log = MetricsLog(run, self.step, self.total_steps)
        try:
            with SignalGuard() as guard:
                while self.step < self.total_steps:
                    self._train_epoch(run, log, tick, guard)
                    epoch = self.step // self.steps_per_epoch
                    last = self.step == self.total_steps
                    if not last:
                        show(self._log_test(log))
                    signum = guard.received
                    if last or signum or epoch % self.config.checkpoint_every == 0:
                        self.save(run)
                    if signum is not None and not last:
                        self._stop(run, signum)
            self.sparsifier.finalize()
            row = self._log_test(log)
            facts = self.facts()
            self.model = to_dense(self.model)
            save_tensors(run.model_path, self.model.state_dict(), facts)
            return row
        finally:
            log.close()

    def evaluate(self) -> tuple[float, float]:
        """Return mean loss and accuracy on the held-out images.

        While masks move, running statistics of batch norms are behind the weights: they are then
        taken of some training images instead. The last evaluation is of what is saved.
        """
        moving = self.step < min(self.last_move, self.total_steps)
        with recalibrated(self.model, self._some_inputs()) if moving else nullcontext():
            workers = self.config.workers
            return loss_and_accuracy(self.model, self.data.test, self.data, self.device, workers)

    def _some_inputs(self) -> Iterator[Tensor]:
        """Yield a few whole batches of training images, the same each time."""
        count = min(_RECALIBRATED, len(self.data.train.labels))
        size = min(self.config.batch_size, count)
        chosen = range(count // size * size)
        shifts = torch.Generator().manual_seed(derive_seed(self.config.seed, "recalibrate", 0))
        for images, _ in batches(self.data.train, size, chosen):
            yield self._prepare(images.to(self.device), shifts)

    def _prepare(self, images: Tensor, shifts: torch.Generator) -> Tensor:
        """Return what the model is given in training."""
        inputs = normalize(images, self.data)
        return augment(inputs, self.data.flip, shifts) if self.config.augment else inputs

    def facts(self) -> Row:
        """Return what a reader of the saved model needs to know."""
        # Always-sparse layers are dense in it.
        names = {f"{name}.values": f"{name}.weight" for name in sparse_layers(self.model)}
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "images": self.data.facts(),
            "method": self.sparsifier.method.settings(),
            "pattern": str(self.sparsifier.pattern),
            "monitor": self.sparsifier.monitor(),
            "layers": [
                {
                    "name": names.get(row.name, row.name),
                    "shape": list(row.shape),
                    "units": row.units,
                    "kept_units": row.kept_units,
                    "cost": row.cost,
                }
                for row in self.sparsifier.layers()
            ],
        }

    def save(self, run: Run) -> None:
        """Write a checkpoint."""
        save_state(
            run.checkpoint_path,
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self._scaler.state_dict(),
                "sparsifier": self.sparsifier.state_dict(),
                "tally": self._tally,
                "selected_before": self._selected_before,
                "facts": self.facts(),
                "run": self._described,
            },
        )

    def load(self, run: Run) -> None:
        """Continue from the run's checkpoint.

        Raises:
            StateError: The checkpoint is of other settings or other data.
            ConfigError: Of other options.
            FileError: It is damaged.
        """
        state = load_state(run.checkpoint_path)
        try:
            refuse_another_run(state, self.config, self._described)
            if state["facts"]["total_steps"] != self.total_steps:
                raise StateError(
                    f"The checkpoint is of a run of {state['facts']['total_steps']} steps, this "
                    f"one has {self.total_steps}: has the data changed?"
                )
            self.model.load_state_dict(state["model"])
            self.sparsifier.load_state_dict(state["sparsifier"])
            # Now that layers have the connections of the checkpoint, and so the shapes.
            refuse_misfit(state, self.optimizer, self.total_steps)
            self.optimizer.load_state_dict(state["optimizer"])
            self._scaler.load_state_dict(state["scaler"])
            self.step = state["step"]
            self._tally = state["tally"]
            before = state["selected_before"]
            self._selected_before = {name: kept.to(self.device) for name, kept in before.items()}
        except ConfigError:
            raise
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise StateError(f"{str(run.checkpoint_path)!r} does not fit: {error}") from error

    def _check_model(self) -> None:
        """Run the model on two zero images, so that what does not fit is told before training."""
        shape = (self.data.channels, self.data.size, self.data.size)
        name, classes = self.config.model, len(self.data.classes)
        try:
            with torch.no_grad():
                logits = self.model.eval()(torch.zeros(2, *shape, device=self.device))
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"The model {name!r} fails on images of {shape}: {error}") from error
        if not isinstance(logits, Tensor) or logits.shape != (2, classes):
            given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ConfigError(
                f"The model {name!r} returns {given} for two images of {classes} classes; logits "
                f"of shape (2, {classes}) are needed."
            )
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ConfigError(f"The model {name!r} has nothing to train.")

    def _convert(self, method: AnyMethod, budget: Budget) -> None:
        """Make the layers sparse whose connections a growth method is to move."""
        if not isinstance(method, GrowthMethod):
            if self.config.every_unit:
                raise ConfigError(f"--every-unit is of growth methods, not of {method.name!r}.")
            return
        allocation = "er" if budget.allocation == "global" else budget.allocation
        density = None if budget.fraction is None else float(budget.fraction)
        every = self.config.every_unit
        self.model = convert(self.model, density, allocation, **self._filters(), every_unit=every)

    def _filters(self) -> dict[str, Any]:
        return {"include": self.config.include or None, "exclude": self.config.exclude or None}

    # One epoch ----------------------------------------------------------------------------------

    def _train_epoch(
        self, run: Run, log: MetricsLog, tick: Callable[[int, Row], None], guard: SignalGuard
    ) -> None:
        epoch, first = divmod(self.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "order", epoch))
        order = torch.randperm(len(self.data.train.labels), generator=generator).tolist()
        every = max(1, self.total_steps // _LOG_ROWS)
        self.model.train()
        latest: Row = {}
        clock, seen = time.perf_counter(), 0
        stream = batches(self.data.train, self.config.batch_size, order, first, self.config.workers)
        for images, labels in stream:
            self._train_step(images, labels)
            seen += len(labels)
            if self.step % every == 0 or self.step == self.total_steps:
                latest = self._train_row(seen / (time.perf_counter() - clock))
                clock, seen = time.perf_counter(), 0
                log.write(latest)
            tick(self.step, latest)
            if guard.received is not None and self.step % self.steps_per_epoch:
                self.save(run)
                self._stop(run, guard.received)

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        config = self.config
        torch.manual_seed(derive_seed(config.seed, "step", self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_lr * lr_factor(config, self.step, self.total_steps)
        images, labels = images.to(self.device), labels.to(self.device)
        shifts = torch.Generator().manual_seed(derive_seed(config.seed, "augment", self.step))
        inputs = self._prepare(images, shifts)
        with self._autocast:
            logits = self._forward(inputs)
            loss = self._loss(logits, inputs, labels)
        self.optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        if config.clip is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.step += 1
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
            counts = torch.stack((loss * len(labels), correct)).double()
            self._tally = self._tally.to(self.device)
            self._tally[:2] += counts
            self._tally[2] += len(labels)

    def _loss(self, logits: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.config.label_smoothing
        if self._teacher is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return self._teacher.loss(logits, inputs, labels, smoothing)

    def _stop(self, run: Run, signum: int) -> None:
        raise InterruptedRunError(
            f"Stopped after step {self.step} of {self.total_steps}. To continue: "
            f"spartan train --resume {run.folder}",
            signum,
        )

    # Rows ---------------------------------------------------------------------------------------

    def _train_row(self, images_per_second: float) -> Row:
        loss, correct, images = self._tally.tolist()
        self._tally = torch.zeros(3, dtype=torch.float64)
        churn = self.sparsifier.churn(self._selected_before)
        self._selected_before = self.sparsifier.selected()
        return {
            "split": "train",
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "loss": loss / images,
            "accuracy": correct / images,
            "lr": self.optimizer.param_groups[0]["lr"],
            "churn": churn,
            "images_per_second": images_per_second,
            **self.sparsifier.monitor(),
        }

    def _log_test(self, log: MetricsLog) -> Row:
        loss, accuracy = self.evaluate()
        row = {
            "split": "test",
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "loss": loss,
            "accuracy": accuracy,
            "density": self.sparsifier.density,
        }
        log.write(row)
        return row


def make_optimizer(config: TrainConfig, model: nn.Module) -> tuple[Optimizer, float]:
    """Return the optimizer and its peak learning rate."""
    name = config.optimizer
    if name == "auto":
        attention = any(isinstance(m, nn.MultiheadAttention) for m in model.modules())
        name = "adamw" if attention or config.model.startswith("timm:vit") else "sgd"
    values = {id(layer.values) for layer in sparse_layers(model).values()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 or id(p) in values]
    plain = [p for p in trained if not (p.dim() > 1 or id(p) in values)]
    decay = config.weight_decay
    if name == "sgd":
        lr = config.lr if config.lr is not None else 0.1
        groups = _groups(decayed, plain, 5e-4 if decay is None else decay)
        return SGD(groups, lr=lr, momentum=0.9, nesterov=True), lr
    lr = config.lr if config.lr is not None else 1e-3
    return AdamW(_groups(decayed, plain, 0.05 if decay is None else decay), lr=lr), lr


def lr_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of a step as a fraction of the peak."""
    warmup = int(config.lr_warmup * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.lr_schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))


def _groups(decayed: list[Any], plain: list[Any], decay: float) -> list[dict[str, Any]]:
    groups = [
        {"params": decayed, "weight_decay": decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
