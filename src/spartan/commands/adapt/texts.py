"""Labelled texts for `spartan adapt`: tables, or docstrings of installed packages."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from spartan.errors import DataError, MissingExtraError
from spartan.seeds import derive_seed

_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_WORDS = 5  # that a docstring's prose must have to count
_FEWEST = 40  # texts that a topic must have


@dataclass(frozen=True)
class Texts:
    """Labelled texts.

    Attributes:
        texts: The texts.
        labels: Of each one, its place among the classes.
    """

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, places: Sequence[int]) -> Texts:
        """Return some of them."""
        return Texts([self.texts[i] for i in places], [self.labels[i] for i in places])


@dataclass(frozen=True)
class TextData:
    """A classification task.

    Attributes:
        train: Training texts.
        test: Held-out texts.
        classes: Class names.
    """

    train: Texts
    test: Texts
    classes: list[str]


def load_texts(
    source: str, per_class: int | None, test_per_class: int | None, seed: int
) -> TextData:
    """Load a text classification task.

    Args:
        source: `docs:PACKAGE`, the documentation of an installed package by sub-package; a table
            (.csv, .tsv, .json, .jsonl, .parquet) with a text and a label column; or a folder with
            such tables called `train` and `test`. Without a test table a tenth of the texts is held
            out, or `test_per_class` of each class.
        per_class: Training texts of each class to draw; all by default.
        test_per_class: Held-out texts of each class to draw; all by default.
        seed: Decides which.

    Raises:
        DataError: Nothing is there, it is not texts and labels, or a class has too few.
        MissingExtraError: The `data` extra is needed for tables.
    """
    if source.startswith("docs:"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is deprecated there
            pairs, test_pairs = list(_documentation(source.removeprefix("docs:"))), None
    else:
        pairs, test_pairs = _tables(Path(source))
    classes = sorted({label for _, label in pairs})
    if len(classes) < 2:
        raise DataError(f"{source!r} has {len(classes)} class: two are the least.")
    numbers = {name: i for i, name in enumerate(classes)}
    unknown = {label for _, label in test_pairs or ()} - numbers.keys()
    if unknown:
        raise DataError(f"The test texts have classes without training texts: {sorted(unknown)}.")
    train = _numbered(pairs, numbers)
    if test_pairs is not None:
        test = _numbered(test_pairs, numbers)
        test = test.take(_draw(test, test_per_class, seed, "test texts", classes))
    else:
        held_out = set(_hold_out(train, test_per_class, seed, classes))
        test = train.take(sorted(held_out))
        train = train.take([i for i in range(len(train)) if i not in held_out])
    train = train.take(_draw(train, per_class, seed, "training texts", classes))
    return TextData(train, test, classes)


def _numbered(pairs: Sequence[tuple[str, str]], numbers: dict[str, int]) -> Texts:
    return Texts([text for text, _ in pairs], [numbers[label] for _, label in pairs])


def _hold_out(texts: Texts, count: int | None, seed: int, classes: list[str]) -> list[int]:
    """Return the places of the texts to test with: `count` of each class, or a tenth of it."""
    drawn: list[int] = []
    for number, name in enumerate(classes):
        places = _shuffled(texts, number, seed, "test texts")
        few = len(places) // 10 or min(1, len(places) - 1) if count is None else count
        if len(places) <= few:
            raise DataError(
                f"Class {name!r} has {len(places)} texts: {few} cannot be held out and one left. "
                "Give fewer --test-per-class, or a table of test texts."
            )
        drawn += places[:few]
    if not drawn:
        raise DataError("Every class has one text: none can be held out. Give more texts.")
    return drawn


def _draw(texts: Texts, count: int | None, seed: int, what: str, classes: list[str]) -> list[int]:
    """Return the places of `count` texts of each class, in order."""
    if count is None:
        return list(range(len(texts)))
    drawn: list[int] = []
    for number, name in enumerate(classes):
        places = _shuffled(texts, number, seed, what)
        if len(places) < count:
            raise DataError(f"Class {name!r} has {len(places)} {what}; {count} are asked for.")
        drawn += places[:count]
    return sorted(drawn)


def _shuffled(texts: Texts, number: int, seed: int, what: str) -> list[int]:
    """Return the places of the texts of a class in random order."""
    places = [i for i, label in enumerate(texts.labels) if label == number]
    generator = torch.Generator().manual_seed(derive_seed(seed, what, number))
    return [places[i] for i in torch.randperm(len(places), generator=generator).tolist()]


def _tables(path: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]] | None]:
    if path.is_file():
        return _table(path), None
    train = _only(path, "train")
    if train is None:
        raise DataError(
            f"{str(path)!r} is neither a table of texts ({', '.join(_READERS)}) nor a folder with "
            "one called train; docs:PACKAGE takes the documentation of an installed package."
        )
    test = _only(path, "test") or _only(path, "validation")
    return _table(train), None if test is None else _table(test)


def _only(folder: Path, stem: str) -> Path | None:
    found = [folder / f"{stem}{suffix}" for suffix in _READERS]
    return next((path for path in found if path.is_file()), None)


def _table(path: Path) -> list[tuple[str, str]]:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise DataError(f"{str(path)!r} is no table that can be read: {', '.join(_READERS)} can.")
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            "Tables need the data extra: pip install 'spartan-torch[data]'."
        ) from error
    datasets.disable_progress_bars()
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table: Any = getattr(datasets.Dataset, f"from_{reader}")(str(path), **options)
    except Exception as error:
        raise DataError(f"Cannot read {str(path)!r}: {error}") from error
    missing = {"text", "label"} - set(table.column_names)
    if missing:
        raise DataError(
            f"{str(path)!r} has columns {', '.join(table.column_names)}; text and label are needed."
        )
    names = getattr(table.features["label"], "names", None)
    pairs = []
    for number, row in enumerate(table, start=1):
        if row["label"] is None or not isinstance(row["text"], str):
            raise DataError(f"{str(path)!r}, text {number}: the text or its label is missing.")
        pairs.append((row["text"], str(names[row["label"]] if names else row["label"])))
    if not pairs:
        raise DataError(f"{str(path)!r} is empty.")
    return pairs


def _documentation(name: str) -> Iterator[tuple[str, str]]:
    """Yield the prose that begins each docstring of a package, with the sub-package it is of."""
    try:
        package = importlib.import_module(name)
    except Exception as error:  # whatever a package does when it is imported
        raise DataError(f"docs:{name}: there is no such package that can be imported.") from error
    for topic in _public(getattr(package, "__path__", ())):
        things = (thing for module in _modules(f"{name}.{topic}") for thing in _documented(module))
        texts = dict.fromkeys(filter(None, map(_prose, things)))
        if len(texts) >= _FEWEST:
            yield from ((text, topic) for text in texts)


def _public(places: Sequence[str]) -> list[str]:
    hidden = ("tests", "testing", "conftest", "setup")
    names = (info.name for info in pkgutil.iter_modules(places))
    return [name for name in names if not name.startswith("_") and name not in hidden]


def _modules(name: str) -> Iterator[ModuleType]:
    """Yield a module and the public ones inside it, as far as they can be imported."""
    try:
        module = importlib.import_module(name)
    except Exception:  # other packages may be needed for it
        return
    yield module
    for inner in _public(getattr(module, "__path__", ())):
        yield from _modules(f"{name}.{inner}")


def _documented(module: ModuleType) -> Iterator[Any]:
    """Yield the public functions and classes of a module, and their public methods."""
    public = getattr(module, "__all__", None) or [n for n in dir(module) if not n.startswith("_")]
    for name in public:
        thing = getattr(module, name, None)
        if inspect.ismodule(thing) or thing is None:
            continue
        yield thing
        if inspect.isclass(thing):
            yield from (member for key, member in vars(thing).items() if not key.startswith("_"))


def _prose(thing: Any) -> str:
    """Return what a docstring says before its first section, as one line."""
    text = inspect.getdoc(thing) if callable(thing) else None
    if not text:
        return ""
    # A signature may stand first; sections are underlined, or begin with a directive.
    text = re.sub(r"\A([\w.]+\([^)]*\)( *->.*)?\n\s*)+", "", text)
    text = re.split(r"\n\s*\w[\w ]*\n\s*[-=]{3,}|\n\s*\.\. |>>> ", text, maxsplit=1)[0]
    words = text.split()
    return " ".join(words) if len(words) >= _WORDS else ""
