"""The tasks of the league: small networks of several kinds, each with one recipe for all methods.

A task trains a network at an exact budget with any method and says how good it has become. Seeds
decide initial weights, order and augmentation, the same for every method.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import one_run
from cifar10 import narrow_resnet20
from spartan import Budget, Channel, Sparsifier
from spartan.always_sparse import convert
from spartan.commands.accuracy import loss_and_accuracy
from spartan.commands.images import ImageData, augment, batches, load_data, normalize
from spartan.commands.models import resnet20, vit
from spartan.commands.options.train import TrainConfig
from spartan.commands.train.trainer import lr_factor, make_optimizer
from spartan.methods.growth import GrowthMethod
from spartan.methods.registry import AnyMethod
from spartan.seeds import derive_seed
from spartan.teachers import Teacher
from spartan.weights.patterns import Block, Pattern, Unstructured

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """One network on one set of data, and the recipe it is trained by.

    Attributes:
        title: What a table calls it.
        densities: Fractions of the weights to keep.
        model: Makes the network.
        batches: Yields the inputs and targets of each step, for a folder of data and a seed.
        score: Accuracy in percent, or bits per character, of a network on held-out data.
        steps: Training steps.
        recipe: Optimizer, learning rate and its schedule.
        pattern: What is kept or pruned together.
        exclude: Parameters that stay dense.
        starts_dense: Whether it begins with a trained network, or prunes more than single weights:
            nothing for layers that are sparse from the start.
        bits: Whether the score is in bits, and less is better.
        mixed: Whether it trains in bfloat16 by autocast, which halves the time of large networks.
        dense_of: The task that trains the same network in the same way.
        methods: Those that are compared; nothing: all.
        seeds: How many.
    """

    title: str
    densities: tuple[float, ...]
    model: Callable[[Path], nn.Module]
    batches: Callable[[Path, int, int], Batches]
    score: Callable[[nn.Module, Path], float]
    steps: int
    recipe: TrainConfig
    pattern: Pattern = field(default_factory=Unstructured)
    exclude: tuple[str, ...] = ()
    starts_dense: bool = False
    bits: bool = False
    mixed: bool = False
    dense_of: str | None = None
    methods: tuple[str, ...] = ()
    seeds: int = 3

    def run(
        self, method: AnyMethod | None, budget: Budget, seed: int, data: Path, taught: bool = False
    ) -> float:
        """Train with a method, or none, and return the score.

        With `taught`, the network learns from the same one trained densely beside the labels.
        """
        warnings.simplefilter("ignore")  # layers and outputs that die are part of what is measured
        teacher = Teacher(self._train(None, budget, seed, data)) if taught else None
        model = self._train(method, budget, seed, data, teacher)
        with torch.no_grad():
            return self.score(model.eval(), data)

    def _train(
        self, method: AnyMethod | None, budget: Budget, seed: int, data: Path,
        teacher: Teacher | None = None,
    ) -> nn.Module:  # fmt: skip
        torch.manual_seed(derive_seed(seed, "init", 0))
        model = self.model(data)
        if isinstance(method, GrowthMethod):
            model = convert(model, budget.density)
        optimizer, _ = make_optimizer(self.recipe, model)
        rate = functools.partial(lr_factor, self.recipe, total_steps=self.steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        sparsifier = None
        if method is not None:
            dense = {"exclude": self.exclude} if self.exclude else {}
            sparsifier = Sparsifier(
                model, optimizer, method, budget, self.steps, self.pattern, **dense
            )
        model.train()
        for inputs, targets in self.batches(data, seed, self.steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
                logits = model(inputs)
                if teacher is None:
                    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
                else:
                    loss = teacher.loss(logits, inputs, targets)
            loss.backward()
            optimizer.step()
            schedule.step()
        if sparsifier is not None:
            sparsifier.finalize()
        return model


# Digits ------------------------------------------------------------------------------------------

_DIGITS_EPOCHS, _DIGITS_BATCH = 30, 64


def digits_mlp(norms: bool) -> nn.Module:
    """Return an MLP 64-256-256-10."""
    layers: list[nn.Module] = []
    for inputs in (64, 256):
        layers.append(nn.Linear(inputs, 256))
        layers += [nn.BatchNorm1d(256), nn.ReLU()] if norms else [nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


@functools.cache
def _digits() -> ImageData:
    return load_data("digits")


def digits_batches(data: Path, seed: int, steps: int) -> Batches:
    """Yield digits as vectors."""
    for inputs, targets in image_batches(_digits(), _DIGITS_BATCH, seed, steps, augmented=False):
        yield inputs.flatten(1), targets


def digits_score(model: nn.Module, data: Path) -> float:
    """Return the accuracy in percent."""
    return accuracy(nn.Sequential(nn.Flatten(), model), _digits())


# Images ------------------------------------------------------------------------------------------

_IMAGES, _BATCH = 10_240, 128


@functools.cache
def cifar10(data: Path, size: int) -> ImageData:
    """Return the first 10,240 training images and all held-out images."""
    return one_run.first_images(load_data(str(data / "cifar10"), size), _IMAGES)


def image_batches(
    data: ImageData, batch: int, seed: int, steps: int, augmented: bool = True
) -> Batches:
    """Yield normalised images, shifted and mirrored, epoch after epoch."""
    step, epoch = 0, 0
    while step < steps:
        order = torch.randperm(len(data.train.labels), generator=_generator(seed, "order", epoch))
        for images, labels in batches(data.train, batch, order.tolist()):
            if step == steps:
                return
            inputs = normalize(images, data)
            if augmented:
                inputs = augment(inputs, data.flip, _generator(seed, "augment", step))
            yield inputs, labels
            step += 1
        epoch += 1


def accuracy(model: nn.Module, data: ImageData) -> float:
    """Return the accuracy on held-out images in percent."""
    return 100 * loss_and_accuracy(model, data.test, data, torch.device("cpu"))[1]


def _generator(seed: int, purpose: str, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, purpose, number))


def plain_cnn() -> nn.Module:
    """Return six convolutions without norms, 24, 48 and 96 channels, and a linear layer."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in (24, 48, 96):
        for stride in (1, 2):
            conv = nn.Conv2d(inputs, width, 3, stride, padding=1)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            layers += [conv, nn.ReLU()]
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def pretrained_resnet20(data: Path) -> nn.Module:
    """Return the ResNet-20 that others have trained on images of 32 x 32."""
    from safetensors.torch import load_file

    model = resnet20(3, 32, 10)
    ours = model.state_dict()
    theirs = load_file(data / "cifar10" / "resnet20.safetensors")
    model.load_state_dict({**ours, **theirs})
    return model


def cifar_batches(size: int) -> Callable[[Path, int, int], Batches]:
    """Return what yields batches of CIFAR-10, scaled to a size."""
    return lambda data, seed, steps: image_batches(cifar10(data, size), _BATCH, seed, steps)


def cifar_score(size: int) -> Callable[[nn.Module, Path], float]:
    """Return what scores networks on CIFAR-10, scaled to a size."""
    return lambda model, data: accuracy(model, cifar10(data, size))


# Characters --------------------------------------------------------------------------------------

_CONTEXT, _TEXTS = 64, 16


class CharacterTransformer(nn.Module):
    """A causal transformer with norms before each part: three layers of width 96, four heads."""

    def __init__(self, symbols: int, width: int = 96, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.positions = nn.Parameter(0.02 * torch.randn(_CONTEXT, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols)

    def forward(self, symbols: Tensor) -> Tensor:
        length = symbols.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.embedding(symbols) + self.positions[:length]
        for block in self.blocks:
            x = block(x, src_mask=causal, is_causal=True)
        logits: Tensor = self.head(self.norm(x))
        return logits


@functools.cache
def _text(data: Path) -> tuple[Tensor, Tensor, int]:
    """Return the training and the held-out part of the text as numbers, and how many there are."""
    text = (data / "tinyshakespeare.txt").read_text(encoding="utf-8")
    symbols = sorted(set(text))
    numbers = torch.tensor([symbols.index(one) for one in text])
    split = int(0.9 * len(numbers))
    return numbers[:split], numbers[split:], len(symbols)


def text_batches(data: Path, seed: int, steps: int) -> Batches:
    """Yield pieces of the text, and each shifted by one."""
    text = _text(data)[0]
    for step in range(steps):
        starts = torch.randint(
            len(text) - _CONTEXT, (_TEXTS, 1), generator=_generator(seed, "text", step)
        )
        pieces = text[starts + torch.arange(_CONTEXT + 1)]
        yield pieces[:, :-1], pieces[:, 1:]


def text_score(model: nn.Module, data: Path) -> float:
    """Return bits per character of the held-out text."""
    text = _text(data)[1]
    pieces = text[: len(text) // _CONTEXT * _CONTEXT].view(-1, _CONTEXT)
    nats = 0.0
    for some in pieces.split(128):
        logits = model(some[:, :-1])
        nats += float(F.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="sum"))
    return nats / (pieces.shape[0] * (_CONTEXT - 1)) / math.log(2)


# All of them -------------------------------------------------------------------------------------


def _sgd(lr: float) -> TrainConfig:
    return TrainConfig(optimizer="sgd", lr=lr)


def _digits_task(norms: bool) -> Task:
    title = f"digits, MLP {'with' if norms else 'without'} norms"
    steps = _DIGITS_EPOCHS * (1437 // _DIGITS_BATCH)
    return Task(
        title, (0.05, 0.02, 0.01), lambda data: digits_mlp(norms), digits_batches, digits_score,
        steps, _sgd(0.1),
    )  # fmt: skip


def _resnet_task(
    pattern: Pattern, densities: tuple[float, ...], epochs: int = 20, exclude: tuple[str, ...] = ()
) -> Task:
    title = "CIFAR-10, narrow ResNet-20" + ("" if pattern == Unstructured() else f", {pattern}")
    steps = epochs * _IMAGES // _BATCH
    return Task(
        title, densities, lambda data: narrow_resnet20(3, 16, 10), cifar_batches(16),
        cifar_score(16), steps, _sgd(0.1),
        pattern, exclude, starts_dense=pattern != Unstructured(),
        dense_of=None if pattern in (Unstructured(), Channel()) else "outputs",
    )  # fmt: skip


# Networks as roomy for their images as a ResNet-50 is for ImageNet take long: one seed, and those
# methods that come closest on the small ones.
_RIVALS = ("spartan", "dual-averaging", "magnitude")


def _vit_task(size: int) -> Task:
    return Task(
        f"CIFAR-10, ViT of width 192, block:{size}x{size}", (0.1,), lambda data: vit(3, 16, 10),
        cifar_batches(16), cifar_score(16), 15 * _IMAGES // _BATCH,
        TrainConfig(optimizer="adamw", lr=1e-3),
        Block(size, size), ("patches.weight", "head.weight"), starts_dense=True, mixed=True,
        dense_of=None if size == 16 else "vit-16", methods=_RIVALS, seeds=1,
    )  # fmt: skip


TASKS: dict[str, Task] = {
    "digits": _digits_task(norms=True),
    "digits-plain": _digits_task(norms=False),
    "resnet": _resnet_task(Unstructured(), (0.1, 0.05, 0.02)),
    "plain": Task(
        "CIFAR-10, six convolutions without norms", (0.1, 0.05, 0.02), lambda data: plain_cnn(),
        cifar_batches(16), cifar_score(16), 20 * _IMAGES // _BATCH, _sgd(0.05),
    ),
    "text": Task(
        "characters, transformer", (0.2, 0.1, 0.05),
        lambda data: CharacterTransformer(_text(data)[2]), text_batches, text_score, 1200,
        TrainConfig(optimizer="adamw", lr=2e-3), bits=True,
    ),
    "outputs": _resnet_task(Channel(), (0.5, 0.3), 10),
    "inputs": _resnet_task(Channel(inputs=True), (0.5, 0.3), 10),
    "blocks": _resnet_task(Block(4, 4), (0.2, 0.1), 10, ("conv1.weight", "linear.weight")),
    "pretrained": Task(
        "CIFAR-10, 5 epochs from a trained ResNet-20", (0.05,), pretrained_resnet20,
        cifar_batches(32), cifar_score(32), 5 * _IMAGES // _BATCH, _sgd(0.02),
        starts_dense=True,
    ),
    "wide": Task(
        "CIFAR-10, ResNet-20 three times as wide", (0.05, 0.02),
        lambda data: resnet20(3, 16, 10, width=48), cifar_batches(16), cifar_score(16),
        20 * _IMAGES // _BATCH, _sgd(0.1), mixed=True, methods=_RIVALS, seeds=1,
    ),
    "vit-16": _vit_task(16),
    "vit-4": _vit_task(4),
}  # fmt: skip
