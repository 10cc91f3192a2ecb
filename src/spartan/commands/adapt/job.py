"""`AdaptJob`: opens a pretrained model, trains adapters one by one, tests and saves them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from spartan.adapters import AdapterModel, MemoryModel, get_adapter_model
from spartan.adapters.adapter import Adapter
from spartan.adapters.files import TENSORS
from spartan.adapters.specialization import Specialization, specialization
from spartan.commands.accuracy import pick_device
from spartan.commands.adapt.texts import TextData, Texts, load_texts
from spartan.commands.options.adapt import AdaptConfig
from spartan.errors import ConfigError, MissingExtraError, NonFiniteError
from spartan.seeds import derive_seed

Tick = Callable[[str, int, int], None]
# Heads by which transformers' classifiers end, for models that bring theirs.
_HEADS = ("classifier", "score", "pre_classifier")


@dataclass(frozen=True)
class AdaptJob:
    """What is adapted, and to what.

    Attributes:
        model: The pretrained classifier, with a new head where it had none.
        head: Paths of the modules of its head.
        tokenizer: Its tokenizer.
        data: The texts.
        device: Where to compute.
    """

    model: nn.Module
    head: tuple[str, ...]
    tokenizer: Any
    data: TextData
    device: torch.device


@dataclass(frozen=True)
class Adapted:
    """What one adapter reached.

    Attributes:
        name: Name of the adapter.
        accuracy: On held-out texts.
        loss: On held-out texts.
        parameters: Trainable parameters, the head among them.
        head_parameters: Of the head.
        bytes: Size of the saved tensors.
        train_per_second: Texts a second in training.
        infer_per_second: Texts a second when tested.
        rows: Loss of each epoch in training.
        specializations: What the parents of each memory say about classes, by layer.
    """

    name: str
    accuracy: float
    loss: float
    parameters: int
    head_parameters: int
    bytes: int
    train_per_second: float
    infer_per_second: float
    rows: list[dict[str, Any]] = field(repr=False)
    specializations: dict[str, Specialization] = field(repr=False)


def open_adapt_job(config: AdaptConfig) -> AdaptJob:
    """Open the model and the texts.

    Raises:
        ConfigError: transformers cannot open the model, or it takes fewer tokens.
        AdapterError: An adapter does not fit the model.
        DataError: There are no texts.
        MissingExtraError: transformers is needed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "Adapting needs transformers: pip install 'spartan-torch[adapters]'."
        ) from error
    if not (Path(config.source) / "config.json").is_file():
        raise ConfigError(f"{config.source!r} is not the folder of a model: it has no config.json.")
    data = load_texts(config.data, config.per_class, config.test_per_class, config.seed)
    torch.manual_seed(derive_seed(config.seed, "head", 0))
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(config.source)
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            config.source,
            num_labels=len(data.classes),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except Exception as error:
        raise ConfigError(f"transformers cannot open {config.source!r}: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(f"The tokenizer of {config.source!r} has no token to fill batches with.")
    model.config.pad_token_id = tokenizer.pad_token_id
    most = getattr(model.config, "max_position_embeddings", config.max_length)
    if config.max_length > min(most, tokenizer.model_max_length):
        raise ConfigError(
            f"--max-length {config.max_length}: the model takes up to "
            f"{min(most, tokenizer.model_max_length)} tokens."
        )
    head = _head_of(model, info)
    for name in config.adapter:
        Adapter(model, config.make_adapter(name, head))  # tells what does not fit
    device = pick_device(config.device)
    return AdaptJob(model.to(device), head, tokenizer, data, device)


def train_adapter(
    config: AdaptConfig, job: AdaptJob, name: str, folder: Path, tick: Tick
) -> Adapted:
    """Train one adapter on the backbone, test it, save it, and take it off again.

    Raises:
        NonFiniteError: The loss diverged; nothing is saved then.
    """
    torch.manual_seed(derive_seed(config.seed, "adapter", 0))
    model = get_adapter_model(job.model, config.make_adapter(name, job.head))
    try:
        rows, seconds = _train(config, job, name, model, tick)
        accuracy, loss, test_seconds = _test(config, job, model)
        if not math.isfinite(loss):
            raise NonFiniteError(f"The loss of {name} is {loss} on held-out texts: lower --lr.")
        read = _specializations(config, job, model)
        model.save_pretrained(folder)
        trainable, _ = model.get_nb_trainable_parameters()
    finally:
        model.unload()
    head = sum(p.numel() for path in job.head for p in job.model.get_submodule(path).parameters())
    return Adapted(
        name=name,
        accuracy=accuracy,
        loss=loss,
        parameters=trainable,
        head_parameters=head,
        bytes=(folder / TENSORS).stat().st_size,
        train_per_second=len(job.data.train) * config.epochs / seconds,
        infer_per_second=len(job.data.test) / test_seconds,
        rows=rows,
        specializations=read,
    )


def _head_of(model: nn.Module, info: dict[str, Any]) -> tuple[str, ...]:
    """Return the modules that the file had no weights for, else those called as heads are."""
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    found = {key.rpartition(".")[0] for key in new if "." in key}
    found |= {path for path, _ in model.named_children() if path in _HEADS} if not found else set()
    if not found:
        raise ConfigError(f"{type(model).__name__} has no head that could be trained.")
    return tuple(sorted(found))


def _train(
    config: AdaptConfig, job: AdaptJob, name: str, model: AdapterModel, tick: Tick
) -> tuple[list[dict[str, Any]], float]:
    """Train with AdamW, a rate that falls to 0, and gradients clipped to norm 1."""
    steps_per_epoch = -(-len(job.data.train) // config.batch_size)
    total = steps_per_epoch * config.epochs
    optimizer = torch.optim.AdamW(_groups(config, job, name, model), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    rows, step, start = [], 0, time.perf_counter()
    for epoch in range(config.epochs):
        model.train()
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "order", epoch))
        order = torch.randperm(len(job.data.train), generator=generator).tolist()
        losses = []
        for batch in _batches(config, job, job.data.train, order):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            step += 1
            tick(name, step, total)
        mean = float(torch.stack(losses).mean())
        if not math.isfinite(mean):
            raise NonFiniteError(f"The loss of {name} is {mean} in epoch {epoch + 1}: lower --lr.")
        rows.append({"adapter": name, "epoch": epoch + 1, "loss": mean})
    return rows, time.perf_counter() - start


def _groups(
    config: AdaptConfig, job: AdaptJob, name: str, model: AdapterModel
) -> list[dict[str, Any]]:
    """Return the parameters of the adapter and those of the head, with their rates."""
    adapter: Any = model.adapters[model.active_adapters[0]]
    head: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for key, tensor in adapter.named_tensors().items():
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            in_head = any(key.startswith(f"{path}.") for path in job.head)
            (head if in_head else rest).append(tensor)
    groups = [{"params": rest, "lr": config.lr_of(name)}, {"params": head, "lr": config.head_lr}]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def _test(config: AdaptConfig, job: AdaptJob, model: AdapterModel) -> tuple[float, float, float]:
    """Return accuracy, loss and seconds."""
    model.eval()
    right, losses, start = 0, 0.0, time.perf_counter()
    for batch in _batches(config, job, job.data.test, range(len(job.data.test))):
        output = model(**batch)
        right += int((output.logits.argmax(-1) == batch["labels"]).sum())
        losses += float(output.loss) * len(batch["labels"])
    count = len(job.data.test)
    return right / count, losses / count, time.perf_counter() - start


def _specializations(
    config: AdaptConfig, job: AdaptJob, model: AdapterModel
) -> dict[str, Specialization]:
    if not isinstance(model, MemoryModel):
        return {}
    usages = [
        model.memory_usage(batch)
        for batch in _batches(config, job, job.data.test, range(len(job.data.test)))
    ]
    labels = torch.tensor(job.data.test.labels)
    return {
        path: specialization(torch.cat([u[path] for u in usages]), labels, len(job.data.classes))
        for path in usages[0]
    }


def _batches(
    config: AdaptConfig, job: AdaptJob, texts: Texts, order: Sequence[int]
) -> Iterator[dict[str, Tensor]]:
    for begin in range(0, len(order), config.batch_size):
        part = texts.take(order[begin : begin + config.batch_size])
        encoded = job.tokenizer(
            part.texts,
            truncation=True,
            max_length=config.max_length,
            padding=True,
            return_tensors="pt",
        )
        batch = {**encoded, "labels": torch.tensor(part.labels)}
        yield {key: value.to(job.device) for key, value in batch.items()}
