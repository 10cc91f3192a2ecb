"""Models in several safetensors files: their index, and which folders belong to from_pretrained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spartan.deploy.packed import PackedTensors, is_dict_of
from spartan.errors import DeployError, FileError
from spartan.files import write_text

INDEX = ".safetensors.index.json"


class ShardedTensors(Mapping[str, Tensor]):
    """The tensors of several files, read one by one.

    Args:
        path: The index: JSON with a `weight_map` of the file of each array.
        max_bytes: See `PackedTensors`; of each file.

    Raises:
        FileError: A file is missing, damaged, or contradicts the others.
    """

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        self.path = path
        self._of: dict[str, PackedTensors] = {}
        self.metadata: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        places = _read_index(path)
        for name in sorted(set(places.values())):
            shard = PackedTensors(path.parent / name, max_bytes)
            twice = self.shapes.keys() & shard.shapes.keys()
            if twice:
                raise FileError(f"{str(path)!r} names two files that hold {min(twice)!r}.")
            self._of |= dict.fromkeys(shard.shapes, shard)
            self.metadata |= shard.metadata
            self.aliases |= shard.aliases
            self.shapes |= shard.shapes
            lost = {array for array, place in places.items() if place == name} - shard.arrays
            if lost:
                raise FileError(
                    f"{str(path)!r} says that {name!r} holds {min(lost)!r}: it does not."
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name][name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that a tensor will have."""
        return self._of[name].dtype(name)

    def check(self) -> None:
        """Refuse files whose indices contradict their shapes.

        Raises:
            FileError: A file is damaged.
        """
        for shard in {id(shard): shard for shard in self._of.values()}.values():
            shard.check()


def open_tensors(path: str | Path, max_bytes: int | None = None) -> PackedTensors | ShardedTensors:
    """Open a safetensors file, packed or not; an index of several; or a folder with one of them.

    Args:
        path: The file or folder.
        max_bytes: See `PackedTensors`; of each file.

    Raises:
        FileError: There is none, or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted((*path.glob(f"*{INDEX}"), *path.glob("*.safetensors")), key=_order)
        if not found:
            raise FileError(f"The folder {str(path)!r} has no safetensors file.")
        path = found[0]
    kind = ShardedTensors if path.name.endswith(INDEX) else PackedTensors
    return kind(path, max_bytes)


def _order(path: Path) -> tuple[bool, bool, str]:
    """Order files of a folder: model.safetensors first, then an index, then others by name."""
    return path.name != "model.safetensors", not path.name.endswith(INDEX), path.name


def _read_index(path: Path) -> dict[str, str]:
    try:
        told: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{str(path)!r} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{str(path)!r} is damaged: {error}.") from error
    places = told.get("weight_map") if isinstance(told, dict) else None
    if not is_dict_of(places, str) or not places:
        raise FileError(f"{str(path)!r} is no index of safetensors files: it has no weight_map.")
    outside = [name for name in places.values() if Path(name).name != name]
    if outside:
        raise FileError(f"{str(path)!r} names {outside[0]!r}, which is not a file beside it.")
    return dict(places)


def divide(sizes: Mapping[str, int], most: int, index: Path) -> dict[Path, list[str]]:
    """Divide tensors over files, in order.

    Args:
        sizes: Bytes of each tensor.
        most: Bytes of a file, if no tensor is larger.
        index: The index that the files lie beside, and are named after.

    Raises:
        DeployError: `most` is not positive.
    """
    if most < 1:
        raise DeployError(f"shard_bytes={most}: a file holds at least one byte.")
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    stem = index.name.removesuffix(INDEX)
    return {
        index.with_name(f"{stem}-{i:05}-of-{len(shards):05}.safetensors"): names
        for i, names in enumerate(shards, 1)
    }


def write_index(path: Path, places: Mapping[str, str], total: int) -> None:
    """Write an index.

    Args:
        path: Its file.
        places: File name of each array.
        total: Bytes of all arrays.
    """
    write_text(path, json.dumps({"metadata": {"total_size": total}, "weight_map": dict(places)}))


def refuse_pretrained(path: Path) -> None:
    """Refuse to pack what `from_pretrained` of transformers or PEFT would read of a folder.

    It would take what is packed for missing, and leave those weights at random.

    Raises:
        DeployError: This is such a file.
    """
    read = {"model.safetensors": ("config.json", "model_type"),
            f"model{INDEX}": ("config.json", "model_type"),
            "adapter_model.safetensors": ("adapter_config.json", "peft_type")}  # fmt: skip
    if path.name not in read:
        return
    config, key = read[path.name]
    try:
        told = json.loads((path.parent / config).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(told, dict) and key in told:
        raise DeployError(
            f"{str(path)!r} is what from_pretrained reads, which knows no packed tensors: choose "
            "another name, such as packed.safetensors. To load that, make the model from its "
            "config and give it to spartan.load; or write an ordinary file with compress=False."
        )
