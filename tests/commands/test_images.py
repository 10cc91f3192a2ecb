"""Data: the digits, image folders, parquet, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spartan.commands import images as data
from spartan.commands.images import LazyImages, augment, batches, load_data, normalize
from spartan.errors import DataError


def write_images(folder: Path, count: int, size: int = 8) -> None:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
            image.fromarray(pixels).save(folder / name / f"{i}.png")


def test_digits() -> None:
    digits = load_data("digits")
    assert len(digits.train.labels) + len(digits.test.labels) == 1797
    assert digits.train.read([0, 5]).shape == (2, 1, 8, 8)
    inputs = normalize(digits.train.read(range(len(digits.train.labels))), digits)
    assert abs(float(inputs.mean())) < 1e-5
    assert float(inputs.std()) == pytest.approx(1, abs=1e-3)
    counts = torch.bincount(digits.test.labels)
    assert len(counts) == 10
    assert int(counts.min()) >= 30


def test_image_folder_with_and_without_test_part(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_images(tmp_path / "one", 10)
    loaded = load_data(str(tmp_path / "one"))
    assert loaded.classes == ["cat", "dog"]
    assert (len(loaded.train.labels), len(loaded.test.labels)) == (18, 2)
    write_images(tmp_path / "two" / "train", 4)
    write_images(tmp_path / "two" / "test", 3)
    loaded = load_data(str(tmp_path / "two"), size=4)
    assert (len(loaded.train.labels), len(loaded.test.labels)) == (8, 6)
    assert loaded.train.read([0]).shape == (1, 3, 4, 4)


def test_large_sets_are_decoded_lazily_and_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    write_images(tmp_path, 10)
    small = load_data(str(tmp_path))
    monkeypatch.setattr(data, "_IN_MEMORY_BYTES", 100)
    large = load_data(str(tmp_path))
    assert isinstance(large.train, LazyImages)
    assert large.mean == small.mean
    order = [3, 1, 17, 0, 5]
    for workers in (0, 2):
        for (a, ya), (b, yb) in zip(
            batches(small.train, 2, order), batches(large.train, 2, order, workers=workers),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(a, b)
            assert torch.equal(ya, yb)


def test_cifar10_parquet(cifar10: str) -> None:
    loaded = load_data(str(Path(cifar10) / "test.parquet"), size=16)
    assert loaded.classes[0] == "airplane"
    assert (len(loaded.train.labels), len(loaded.test.labels)) == (4500, 500)
    assert (loaded.channels, loaded.size) == (3, 16)


def test_missing_and_unreadable_data(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="No data at"):
        load_data(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="Cannot read"):
        load_data(str(tmp_path / "empty"))
    (tmp_path / "train.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="Cannot read"):
        load_data(str(tmp_path))
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"x": [1, 2]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="'image' and 'label' are needed"):
        load_data(str(tmp_path))
    (tmp_path / "train.parquet").rename(tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"none named train\*.parquet"):
        load_data(str(tmp_path))


def test_batches_can_start_in_the_middle() -> None:
    digits = load_data("digits")
    order = list(range(100))
    whole = list(batches(digits.train, 32, order))
    rest = list(batches(digits.train, 32, order, first=2))
    assert [len(y) for _, y in whole] == [32, 32, 32, 4]
    for (a, _), (b, _) in zip(whole[2:], rest, strict=True):
        assert torch.equal(a, b)


def test_augmentation_shifts_and_mirrors() -> None:
    images = torch.arange(1.0, 65).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    moved = augment(images, True, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert len(moved.unique(dim=0)) == 18  # 3 x 3 shifts, mirrored or not
    again = augment(images, True, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again)
    assert len(augment(images, False, torch.Generator().manual_seed(0)).unique(dim=0)) == 9
    unshifted = (moved == images).flatten(1).all(1).any()
    assert bool(unshifted)
