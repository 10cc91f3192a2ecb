"""Checkpoints: whole or not there, no pickle, any nesting."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from spartan import files
from spartan.errors import FileError
from spartan.files import load_state, save_state, save_tensors, write_text


def test_state_round_trips_with_integer_keys_and_shared_tensors(tmp_path: Path) -> None:
    model = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    shared = torch.arange(4)
    state = {
        "optimizer": optimizer.state_dict(),
        "a": shared,
        "b": [shared, {"c": None, 3: True}],
        "t": (1, 2.5, "x"),
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "strided": torch.randn(4, 6)[:, ::2],
    }
    save_state(tmp_path / "s.safetensors", state)
    loaded = load_state(tmp_path / "s.safetensors")
    twin = torch.optim.AdamW(model.parameters())
    twin.load_state_dict(loaded["optimizer"])
    old, new = optimizer.state_dict(), twin.state_dict()
    assert new["param_groups"] == old["param_groups"]
    for key, entry in old["state"].items():
        assert all(torch.equal(v, new["state"][key][k]) for k, v in entry.items())
    assert loaded["b"][1] == {"c": None, 3: True}
    assert loaded["t"] == (1, 2.5, "x")
    assert torch.equal(loaded["strided"], state["strided"])
    assert loaded["bf16"].dtype == torch.bfloat16


def test_model_file_loads_with_any_safetensors_reader(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_tensors(tmp_path / "m.safetensors", model.state_dict(), {"step": 3})
    twin = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    twin.load_state_dict(load_file(tmp_path / "m.safetensors"))
    assert torch.equal(twin[1].weight, model[1].weight)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(FileError, match="There is no file"):
        load_state(path)
    save_state(path, {"a": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileError, match="damaged"):
        load_state(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(FileError, match="damaged"):
        load_state(path)
    from safetensors.torch import save_file

    save_tensors(path, {"a": torch.ones(2)}, {"step": 1, "other": 2})
    with pytest.raises(FileError, match="not a checkpoint"):
        load_state(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(FileError, match="not a checkpoint"):
        load_state(path)


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.safetensors"
    save_state(path, {"a": torch.ones(3)})

    def full(file: Path, *_: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_file", full)
    with pytest.raises(FileError, match="No space left"):
        save_state(path, {"a": torch.zeros(3)})
    assert torch.equal(load_state(path)["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "t", "one")
    write_text(tmp_path / "t", "two")
    assert (tmp_path / "t").read_text(encoding="utf-8") == "two"
    with pytest.raises(FileError, match="Cannot write"):
        write_text(tmp_path / "missing" / "t", "x")
    with pytest.raises(FileError, match="Cannot write"):
        write_text(tmp_path / "t" / "below a file", "x")


def test_states_hold_only_plain_things(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="/a holds a object"):
        save_state(tmp_path / "s", {"a": object()})
