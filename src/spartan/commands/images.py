"""Images and labels: scikit-learn's digits, image folders, and parquet files.

Images are uint8 tensors (channels, height, width). Small data sets are decoded once; large ones
(more than a gigabyte) are decoded batch by batch in the loader's workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spartan.errors import DataError, MissingExtraError

_IN_MEMORY_BYTES = 1 << 30


class Images(Protocol):
    """A set of images that can be read in batches."""

    labels: Tensor

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return uint8 images (batch, channels, size, size)."""


@dataclass(frozen=True)
class ImageData:
    """A classification task.

    Attributes:
        train: Training images.
        test: Held-out images.
        channels: 1 or 3.
        size: Height and width.
        classes: Class names.
        mean: Per-channel mean of training pixels in [0, 1].
        std: Their standard deviation.
        flip: Whether a mirrored image means the same; digits do not.
    """

    train: Images
    test: Images
    channels: int
    size: int
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool

    def facts(self) -> dict[str, Any]:
        """Return what a reader of a model of these images needs to know, as plain values."""
        return {
            "channels": self.channels,
            "size": self.size,
            "classes": self.classes,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def load_data(source: str, size: int | None = None) -> ImageData:
    """Load `digits`, a folder of class folders, or parquet files with image and label columns.

    Args:
        source: `digits`, or a path: a parquet file, a folder with `train*.parquet` and
            `test*.parquet` (or `validation*`), or a folder with `train/CLASS/*.png` and `test/`.
            Without a test part, a tenth of the images (every tenth) is held out.
        size: Height and width to scale images to; by default those of the first image.

    Raises:
        DataError: Nothing there, or not images and labels.
        MissingExtraError: The `data` extra is needed.
    """
    if source == "digits":
        return _digits()
    path = Path(source)
    try:
        there = path.exists()
    except (OSError, ValueError):  # no name that a file could have
        there = False
    if not there:
        raise DataError(
            f"No data at {source[:200]!r}: give 'digits', a folder of images sorted into class "
            "folders, or parquet files with an image and a label column."
        )
    train, test = _read_splits(path)
    return _decode(train, test, size, source)


@dataclass
class MemoryImages:
    """Decoded images in one tensor."""

    images: Tensor
    labels: Tensor

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return uint8 images (batch, channels, size, size)."""
        return self.images[torch.as_tensor(indices)]


@dataclass
class LazyImages:
    """Images decoded when they are read, from a `datasets.Dataset`."""

    rows: Any
    labels: Tensor
    channels: int
    size: int

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return uint8 images (batch, channels, size, size)."""
        pictures = self.rows[[int(i) for i in indices]]["image"]
        return torch.stack([_to_tensor(p, self.channels, self.size) for p in pictures])


def _digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtraError(
            "The digits come with scikit-learn: pip install 'spartan-torch[cli]'."
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    kept, held_out = train_test_split(
        torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    train = MemoryImages(images[kept], labels[kept])
    test = MemoryImages(images[held_out], labels[held_out])
    mean, std = _statistics(train.images)
    return ImageData(train, test, 1, 8, [str(d) for d in range(10)], mean, std, flip=False)


def _read_splits(path: Path) -> tuple[Any, Any]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            "Reading image folders and parquet needs: pip install 'spartan-torch[data]'."
        ) from error
    datasets.disable_progress_bars()
    try:
        if path.is_file() or any(path.glob("*.parquet")):
            loaded = datasets.load_dataset("parquet", data_files=_parquet_files(path))
        else:
            loaded = datasets.load_dataset("imagefolder", data_dir=str(path))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"Cannot read {str(path)!r} as images: {error}") from error
    train = loaded["train"]
    if not {"image", "label"} <= set(train.column_names):
        raise DataError(
            f"{str(path)!r} has the columns {', '.join(train.column_names)}; 'image' and 'label' "
            "are needed."
        )
    for name in ("test", "validation"):
        if name in loaded:
            return train, loaded[name]
    held_out = [i for i in range(len(train)) if i % 10 == 9]
    rest = [i for i in range(len(train)) if i % 10 != 9]
    if not held_out:
        raise DataError(f"{str(path)!r} holds only {len(train)} images; at least 10 are needed.")
    return train.select(rest), train.select(held_out)


def _parquet_files(path: Path) -> dict[str, list[str]]:
    if path.is_file():
        return {"train": [str(path)]}
    files: dict[str, list[str]] = {}
    for split in ("train", "test", "validation"):
        found = sorted(str(p) for p in path.glob(f"{split}*.parquet"))
        if found:
            files[split] = found
    if "train" not in files:
        raise DataError(f"{str(path)!r} holds parquet files, but none named train*.parquet.")
    return files


def _decode(train: Any, test: Any, size: int | None, source: str) -> ImageData:
    try:
        first = train[0]["image"]
        channels = 1 if first.mode in ("1", "L", "I", "I;16") else 3
        side = size or min(first.size)
        parts = []
        for rows in (train, test):
            labels = torch.tensor(rows["label"][:], dtype=torch.int64)
            lazy = LazyImages(rows, labels, channels, side)
            small = len(rows) * channels * side * side <= _IN_MEMORY_BYTES
            parts.append(MemoryImages(_read_all(lazy), labels) if small else lazy)
    except Exception as error:
        raise DataError(f"Cannot decode the images of {source!r}: {error}") from error
    if min(len(part.labels) for part in parts) == 0:
        raise DataError(f"The training or the test part of {source!r} holds no images.")
    if int(min(part.labels.min() for part in parts)) < 0:
        raise DataError(f"{source!r} holds images without a label (label -1).")
    names = getattr(train.features["label"], "names", None)
    count = int(max(part.labels.max() for part in parts)) + 1
    classes = list(names) if names else [str(i) for i in range(count)]
    # A thousand images, evenly spaced, tell mean and spread.
    step = -(-len(parts[0].labels) // 1000)
    mean, std = _statistics(parts[0].read(range(0, len(parts[0].labels), step)))
    return ImageData(parts[0], parts[1], channels, side, classes, mean, std, flip=True)


def _read_all(images: LazyImages) -> Tensor:
    count = len(images.labels)
    chunks = [images.read(range(i, min(i + 1000, count))) for i in range(0, count, 1000)]
    return torch.cat(chunks)


def _to_tensor(picture: Any, channels: int, size: int) -> Tensor:
    picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size != (size, size):
        picture = picture.resize((size, size))
    array = np.array(picture, dtype=np.uint8).reshape(size, size, channels)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # Sums of whole numbers are exact: sums of fractions would depend on the number of threads, and
    # with them all that is computed from here on.
    count = images.numel() // images.shape[1]
    totals = images.sum(dim=(0, 2, 3), dtype=torch.int64).tolist()
    squares = images.int().square_().sum(dim=(0, 2, 3), dtype=torch.int64).tolist()
    mean = [total / count / 255 for total in totals]
    spread = [s * count - t * t for s, t in zip(squares, totals, strict=True)]
    std = [max(1e-3, math.sqrt(x / count / max(1, count - 1)) / 255) for x in spread]
    return tuple(mean), tuple(std)


def batches(
    images: Images, batch_size: int, order: Sequence[int], first: int = 0, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (uint8 images, labels) batch by batch in the given order, from batch `first` on."""
    chunks = [list(order[i : i + batch_size]) for i in range(0, len(order), batch_size)][first:]
    # Memory images need no workers: indexing is cheaper than sending batches between processes.
    lazy_workers = workers if isinstance(images, LazyImages) else 0
    loader = DataLoader(_Batches(images, chunks), batch_size=None, num_workers=lazy_workers)
    yield from loader


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, images: Images, chunks: list[list[int]]) -> None:
        self.images, self.chunks = images, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        chunk = self.chunks[index]
        return self.images.read(chunk), self.images.labels[torch.as_tensor(chunk)]


def normalize(images: Tensor, data: ImageData) -> Tensor:
    """Return float images with the training set's mean 0 and standard deviation 1."""
    shape = (1, -1, 1, 1)
    mean = torch.tensor(data.mean, device=images.device).view(shape)
    std = torch.tensor(data.std, device=images.device).view(shape)
    return images.float().div_(255).sub_(mean).div_(std)


def augment(images: Tensor, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its size, zero-padded, and mirror half of them.

    For 32 x 32 images this is the usual crop with 4 pixels of padding.

    Args:
        images: Normalised float images (batch, channels, size, size).
        flip: Whether to mirror.
        generator: CPU generator that decides.
    """
    count, _, size, _ = images.shape
    pad = size // 8
    shifts = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    span = torch.arange(size)
    rows = span[None] + shifts[0][:, None]
    cols = span[None] + shifts[1][:, None]
    if flip:
        cols = torch.where(mirrored[:, None], cols.flip(1), cols)
    padded = F.pad(images, (pad, pad, pad, pad))
    index = torch.arange(count)[:, None, None]
    rows, cols = rows.to(images.device), cols.to(images.device)
    picked = padded.permute(0, 2, 3, 1)[index.to(images.device), rows[:, :, None], cols[:, None]]
    return picked.permute(0, 3, 1, 2).contiguous()
