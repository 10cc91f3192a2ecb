"""Loading into a model: by any of its names, from one file or several, and values that it holds."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import spartan
from spartan.deploy.shards import ShardedTensors, open_tensors
from spartan.errors import DeployError, FileError


class Language(nn.Module):
    """An embedding, and a head that may be tied to it."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 8), nn.Linear(8, 40, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_a_tied_tensor_needs_to_be_there_once(tmp_path: Path) -> None:
    weight = torch.randn(40, 8)
    for name in ("embed.weight", "head.weight"):
        save_file({name: weight}, tmp_path / "once.safetensors")
        model = Language(tied=True)
        spartan.load(tmp_path / "once.safetensors", model)
        assert torch.equal(model.head.weight, weight)
        assert model.head.weight is model.embed.weight
        with pytest.raises(DeployError, match="lacks"):
            spartan.load(tmp_path / "once.safetensors", Language(tied=False))


def test_two_tensors_for_one_are_refused_unless_they_are_equal(tmp_path: Path) -> None:
    path, model = tmp_path / "two.safetensors", Language(tied=True)
    spartan.save(Language(tied=False), path)
    before = model.embed.weight.detach().clone()
    with pytest.raises(DeployError, match="different values for 'embed.weight' and 'head.weight'"):
        spartan.load(path, model)
    assert torch.equal(model.embed.weight, before)
    same = torch.full((40, 8), float("nan"))
    save_file({"embed.weight": same, "head.weight": same.clone()}, path)
    spartan.load(path, model)
    assert model.head.weight.isnan().all()


@pytest.mark.parametrize("fits", [True, False])
def test_views_of_one_memory_are_compared_where_they_overlap(fits: bool, tmp_path: Path) -> None:
    class Views(nn.Module):
        whole: Tensor
        part: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("whole", torch.zeros(6, 4))
            self.register_buffer("part", self.whole[2:4])

    whole = torch.arange(24.0).view(6, 4)
    part = whole[2:4].clone() if fits else torch.ones(2, 4)
    save_file({"whole": whole, "part": part}, tmp_path / "x.safetensors")
    model = Views()
    if fits:
        spartan.load(tmp_path / "x.safetensors", model)
        assert torch.equal(model.whole, whole)
    else:
        with pytest.raises(DeployError, match="different values"):
            spartan.load(tmp_path / "x.safetensors", model)
        assert not model.whole.any()


@pytest.mark.parametrize(
    ("given", "dtype", "fits"),
    [
        (torch.tensor([1e6]), torch.float16, False),
        (torch.tensor([1e6]), torch.bfloat16, True),
        (torch.tensor([float("inf")]), torch.float16, True),
        (torch.tensor([0.1]), torch.float16, True),
        (torch.tensor([300]), torch.uint8, False),
        (torch.tensor([-1]), torch.uint8, False),
        (torch.tensor([255]), torch.uint8, True),
        (torch.tensor([2**24 + 1]), torch.float32, False),
        (torch.tensor([2]), torch.bool, False),
        (torch.tensor([1.0]), torch.int64, False),
        (torch.tensor([1j]), torch.float32, False),
        (torch.tensor([1.0]), torch.complex64, True),
    ],
)
def test_values_that_do_not_fit_are_refused(
    given: Tensor, dtype: torch.dtype, fits: bool, tmp_path: Path
) -> None:
    save_file({"x": given}, tmp_path / "x.safetensors")
    model = nn.Module()
    model.register_buffer("x", torch.zeros(1, dtype=dtype))
    if fits:
        spartan.load(tmp_path / "x.safetensors", model)
        assert torch.equal(model.get_buffer("x"), given.to(dtype))
    else:
        with pytest.raises(DeployError, match="in the file"):
            spartan.load(tmp_path / "x.safetensors", model)
        assert not model.get_buffer("x").any()


def test_prefixes_of_wrappers_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        save_file({prefix + name: tensor for name, tensor in state.items()}, path)
        other = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        spartan.load(path, other)
        assert torch.equal(other[2].weight, state["2.weight"])
    save_file(state, path)
    wrapped = nn.ModuleDict({"module": nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))})
    spartan.load(path, wrapped)
    assert torch.equal(wrapped.state_dict()["module.0.bias"], state["0.bias"])


def test_a_part_of_a_model_is_loaded_if_asked_and_told(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    spartan.save(
        {"0.weight": torch.ones(3, 4), "0.bias": torch.ones(3), "old": torch.ones(1)}, path
    )
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(DeployError, match="strict=False"):
        spartan.load(path, model)
    with pytest.warns(UserWarning, match=r"lacks \['1.bias', '1.weight'\] and has \['old'\]"):
        spartan.load(path, model, strict=False)
    assert model[0].weight.eq(1).all()


def test_files_in_shards(tmp_path: Path) -> None:
    model = Language(tied=True)
    model.more = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    with torch.no_grad():
        for layer in model.more:
            layer.weight.mul_(torch.rand(64, 64) < 0.1)
    index = tmp_path / "model.safetensors.index.json"
    spartan.save(model, index, shard_bytes=4000)
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    assert len(set(places.values())) >= 3
    for name in set(places.values()):
        held = load_file(tmp_path / name)
        assert held.keys() == {array for array, place in places.items() if place == name}
    for path in (index, tmp_path):
        other = Language(tied=True)
        other.more = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
        spartan.load(path, other)
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor)
    assert spartan.load(index).keys() == model.state_dict().keys()


def test_shards_of_others_load_and_can_be_packed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(64, 64)}, tmp_path / "model-00002-of-00002.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": places}))
    tensors = open_tensors(index)
    assert isinstance(tensors, ShardedTensors)
    assert (len(tensors), tensors.dtype("b")) == (2, torch.float32)
    spartan.save(tensors, tmp_path / "packed.safetensors")
    assert spartan.load(tmp_path / "packed.safetensors").keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "damaged"),
        ("[]", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "not a file beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "no file"),
        ('{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}', "two files"),
    ],
)
def test_wrong_indices_are_refused(text: str, reason: str, tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(FileError, match=reason):
        spartan.load(index)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="no safetensors file"):
        spartan.load(tmp_path / "empty")
    with pytest.raises(DeployError, match="at least one byte"):
        spartan.save({"a": torch.ones(1)}, index, shard_bytes=0)


def test_two_of_four_by_compressed_tensors_loads(tmp_path: Path) -> None:
    w = torch.randn(16, 8, 4)
    w.scatter_(2, w.abs().argsort(2)[..., :2], 0.0)
    w = w.view(16, 32)
    bitmask = np.packbits((w != 0).numpy(), axis=-1, bitorder="little")
    save_file(
        {
            "layer.weight.shape": torch.tensor(w.shape),
            "layer.weight.compressed": w[w != 0].view(16, 16),
            "layer.weight.bitmask": torch.from_numpy(bitmask),
        },
        tmp_path / "x.safetensors",
    )
    assert torch.equal(spartan.load(tmp_path / "x.safetensors")["layer.weight"], w)


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(FileError, match=r"no safetensors file: torch\.load"):
        spartan.load(path)
    path.write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) * 40)
    with pytest.raises(FileError, match="GGUF"):
        spartan.load(path)
    spartan.save({"w": torch.zeros(64, 64)}, path)
    raw = path.read_bytes()
    newer = raw.replace(b'{\\"version\\": 1', b'{\\"version\\": 7')
    path.write_bytes(newer.replace(b"spartan.crc32", b"spartan.other"))
    with pytest.raises(FileError, match="version 7") as told:
        spartan.load(path)
    assert "damaged" not in str(told.value)


def test_what_peft_and_transformers_read_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for name in ("adapter_model.safetensors", "model.safetensors.index.json"):
        with pytest.raises(DeployError, match="from_pretrained"):
            spartan.save({"w": torch.zeros(64, 64)}, tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            spartan.save({"w": torch.zeros(64, 64)}, tmp_path / name, compress=False)
