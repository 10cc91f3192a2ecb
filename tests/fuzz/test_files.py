"""Files that were damaged or made up: refused in one sentence, or read as the format says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import spartan
from spartan.adapters import AdapterModel, MemoryConfig, get_adapter_model
from spartan.commands.inspection import verify_file
from spartan.container import bits_of
from spartan.deploy.packed import PackedTensors
from spartan.errors import FileError, SpartanError
from spartan.example_inputs import tensors_of
from spartan.files import load_state, save_state
from spartan.world_model.files import load_model, save_model
from spartan.world_model.model import TransitionConfig, TransitionModel
from tests.fuzz.hostile import FOLDER, files
from tests.fuzz.mutations import (
    change_arrays,
    change_metadata,
    change_text,
    draws,
    flip_bit,
    join,
    split,
)

HOSTILE = sorted(FOLDER.glob("*.safetensors"))


def packed_state() -> dict[str, Tensor]:
    """One tensor in each layout, and dense ones."""
    torch.manual_seed(0)
    sparse = torch.randn(40, 72)
    blocks = torch.randn(64, 64) * (torch.rand(4, 64) < 0.2).repeat_interleave(16, 0) + 0.0
    return {
        "by_bitmask": sparse * (torch.rand(40, 72) < 0.5) + 0.0,
        "by_gaps": sparse * (torch.rand(40, 72) < 0.06) + 0.0,
        "by_columns": torch.randn(2, 3000) * (torch.rand(2, 3000) < 0.002) + 0.0,
        "by_blocks": blocks,
        "by_two_of_four": torch.tensor([1.0, 2.0, 0.0, 0.0] * 720).view(40, 72),
        "whole_numbers": torch.arange(7),
        "halves": torch.randn(5).half(),
    }


def optimizer_state() -> dict[str, Any]:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return {"step": 3, "optimizer": optimizer.state_dict(), "model": model.state_dict()}


def same(a: Any, b: Any) -> bool:
    pairs = zip(tensors_of(a), tensors_of(b), strict=True)
    return all(x.dtype is y.dtype and (bits_of(x) == bits_of(y)).all() for x, y in pairs)


@pytest.mark.parametrize("kind", ["packed", "checkpoint"])
def test_a_flipped_bit_is_refused_or_changes_nothing(kind: str, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.safetensors", tmp_path / "flipped.safetensors"
    read: Callable[[Path], Any] = spartan.load if kind == "packed" else load_state
    if kind == "packed":
        spartan.save(packed_state(), whole)
    else:
        save_state(whole, optimizer_state())
    expected = read(whole)
    refused = passed = 0
    for seed, draw in draws(300):
        shutil.copy(whole, path)
        flip_bit(path, draw)
        try:
            found = read(path)
        except FileError:
            refused += 1
        else:
            assert same(found, expected), seed
            passed += 1
    # What passes is the name of the entry of checksums, whose loss leaves all others as they are.
    assert passed <= 0.05 * (refused + passed)


@pytest.mark.parametrize("change", [change_metadata, change_arrays])
def test_made_up_packed_files(change: Callable[[Path, Any], None], tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.safetensors", tmp_path / "changed.safetensors"
    state = packed_state()
    spartan.save(state, whole)
    for seed, draw in draws(150):
        shutil.copy(whole, path)
        change(path, draw)
        model = nn.Module()
        for name, tensor in state.items():
            model.register_buffer(name, torch.zeros_like(tensor))
        try:
            spartan.load(path, model)
        except SpartanError:
            assert not any(x.any() for x in model.buffers()), seed
            continue
        # Lies about layouts are found out; what the arrays hold is only theirs to say.
        if change is change_metadata:
            assert same(model.state_dict(), state), seed


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.stem)
def test_hostile_files_are_refused(path: Path) -> None:
    assert path.read_bytes() == files()[path.stem]
    model = nn.Module()
    model.register_buffer("w", torch.zeros(4, 8))
    with pytest.raises(SpartanError):
        spartan.load(path, model)
    assert not model.get_buffer("w").any()
    with pytest.raises(FileError):
        spartan.load(path)


def test_world_models(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.safetensors", tmp_path / "changed.safetensors"
    save_model(whole, TransitionModel(TransitionConfig(4, 2, width=8, hidden=8)))
    for seed, draw in draws(60):
        shutil.copy(whole, path)
        draw.choice((change_metadata, change_arrays))(path, draw)
        try:
            load_model(path)
        except FileError:
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


def test_adapters(tmp_path: Path) -> None:
    def base() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), 2)

    whole = tmp_path / "whole"
    get_adapter_model(base(), MemoryConfig(num_parents=4, top_k=2)).save_pretrained(whole)
    for seed, draw in draws(40):
        folder = tmp_path / seed
        shutil.copytree(whole, folder)
        config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        if draw.random() < 0.5:
            change_text(config, draw)
            # In both files, as somebody who lies would write it.
            if draw.random() < 0.7:
                rewrite(tensors, config.read_text(encoding="utf-8"))
        else:
            change_arrays(tensors, draw)
        model = base()
        try:
            AdapterModel.from_pretrained(model, folder)
        except SpartanError:
            assert not any(m._forward_hooks for m in model.modules()), seed
            assert all(p.requires_grad for p in model.parameters()), seed
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


def rewrite(path: Path, text: str) -> None:
    header, data = split(path.read_bytes())
    header["__metadata__"] = {"spartan": text}
    path.write_bytes(join(header, data))


def test_threads_may_read_one_file(tmp_path: Path) -> None:
    state = {f"w{i}": torch.randn(200, 200) for i in range(20)}
    spartan.save(state, tmp_path / "w.safetensors")
    for _ in range(5):
        tensors = PackedTensors(tmp_path / "w.safetensors")
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(tensors.get, [f"w{i // 8}" for i in range(160)])
            assert all(tensor is not None for tensor in found)


def test_verify(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    spartan.save(packed_state(), path)
    assert verify_file(path) == len(load_file(path))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FileError, match="checksum of 'halves'"):
        verify_file(path)
    with pytest.raises(FileError, match="checksum of 'halves'"):
        spartan.load(path)
