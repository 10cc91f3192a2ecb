"""Packed files: exact, small, readable by others, and distrusted until checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import spartan
from spartan.container import CODES, WITH_PLAIN_ZEROS
from spartan.deploy.layouts import LAYOUTS, Layout, MatrixShape, smallest, stored_bytes
from spartan.deploy.packed import PackedTensors
from spartan.deploy.sizes import Sizes, measure_sizes
from spartan.errors import DeployError, FileError
from tests.conftest import ROOT
from tests.test_docs import blocks_of

sides = st.integers(1, 40)


def pruned(*shape: int, density: float = 0.1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    kept = torch.rand(shape, generator=generator) < density
    return torch.where(kept, torch.randn(shape, generator=generator), 0.0).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@settings(deadline=None, max_examples=200)
@given(hnp.arrays(st.sampled_from(["u1", "u2", "u4"]), st.tuples(sides, sides),
                  elements=st.sampled_from([0, 0, 0, 0, 0, 1, 255])))  # fmt: skip
def test_every_layout_is_exact(matrix: Any) -> None:
    shape = MatrixShape(matrix.shape)
    for layout in LAYOUTS:
        parts = layout.encode(matrix)
        if parts is not None:
            assert set(parts) == set(layout.parts)
            assert np.array_equal(layout.decode(parts, shape), matrix)
    best = smallest(matrix, 10)
    assert best is None or stored_bytes(best[1], 10) < matrix.nbytes


@pytest.mark.parametrize("gap", [254, 255, 256, 257, 511, 512, 65535, 65536, 65537, 131072])
def test_long_gaps(gap: int) -> None:
    matrix = np.zeros((1, 2 * gap + 3), np.uint16)
    matrix[0, [gap, 2 * gap + 1]] = 7
    gaps = next(layout for layout in LAYOUTS if layout.name == "gaps")
    parts = gaps.encode(matrix)
    assert parts is not None
    assert np.array_equal(gaps.decode(parts, MatrixShape(matrix.shape)), matrix)


@pytest.mark.parametrize("dtype", list(CODES))
def test_round_trip_of_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    if dtype is torch.float4_e2m1fn_x2:  # torch makes none from other numbers
        state = {"a": torch.randint(0, 256, (32, 48), dtype=torch.uint8).view(dtype)}
    else:
        state = {"a": pruned(32, 48).mul(100).to(dtype), "b": pruned(3, 8, 3, 3).to(dtype)}
        state["scalar"] = torch.ones((), dtype=dtype)
        state["none"] = torch.zeros(0, 4, dtype=dtype)
    spartan.save(state, tmp_path / "x.safetensors")
    back = spartan.load(tmp_path / "x.safetensors")
    assert set(back) == set(state)
    for name, tensor in state.items():
        assert back[name].dtype == dtype
        assert back[name].shape == tensor.shape
        if dtype in WITH_PLAIN_ZEROS:
            tensor = torch.where(tensor == 0, torch.zeros_like(tensor), tensor)
        assert torch.equal(bits(back[name]), bits(tensor))


def test_special_values_survive_and_minus_zero_becomes_zero(tmp_path: Path) -> None:
    w = pruned(64, 64)
    w[0, 0], w[1, 1], w[2, 2], w[3, 3] = float("nan"), float("-inf"), 1e-45, -0.0
    dense = torch.tensor([-0.0, 1.0])
    spartan.save({"w": w, "dense": dense}, tmp_path / "x.safetensors")
    back = spartan.load(tmp_path / "x.safetensors")
    w[3, 3] = 0.0
    assert torch.equal(bits(back["w"]), bits(w))
    assert torch.equal(bits(back["dense"]), bits(dense))


@pytest.mark.parametrize(("density", "most"), [(0.1, 0.14), (0.05, 0.08), (0.02, 0.03)])
def test_ratios(density: float, most: float, tmp_path: Path) -> None:
    state = {"w": pruned(512, 1024, density=density)}
    (stored,) = spartan.save(state, tmp_path / "x.safetensors")
    assert stored.bytes <= most * stored.dense_bytes


def test_blocks_and_two_of_four_have_their_layouts(tmp_path: Path) -> None:
    blocks = torch.randn(64, 64) * (torch.rand(4, 64) < 0.1).repeat_interleave(16, 0)
    four = torch.randn(64, 16, 4)
    four.scatter_(2, four.abs().argsort(2)[..., :2], 0.0)
    stored = spartan.save(
        {"blocks": blocks + 0.0, "four": four.view(64, 64)}, tmp_path / "x.safetensors"
    )
    assert [s.layout for s in stored] == ["blocks", "2:4"]


def test_what_is_not_smaller_stays_dense(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    stored = spartan.save({"w": torch.randn(20, 20)}, path)
    assert [s.layout for s in stored] == ["dense"]
    assert set(load_file(path)) == {"w"}
    sizes = measure_sizes(stored, path.stat().st_size, None)
    assert str(sizes).startswith("not compressed")
    assert "packed" in str(Sizes(100, 50, 60))


def test_narrow_values(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    state = {"w": pruned(64, 64), "bias": torch.randn(64)}
    spartan.save(state, path, values="bfloat16")
    back = spartan.load(path)
    assert torch.equal(back["w"], state["w"].bfloat16().float())
    assert torch.equal(back["bias"], state["bias"])
    with pytest.raises(DeployError, match="bfloat16"):
        spartan.save({"w": pruned(8, 8) * 1e9}, path, values="float16")
    with pytest.raises(DeployError, match="choose"):
        spartan.save(state, path, values="int4")
    assert torch.equal(spartan.load(path)["bias"], state["bias"])  # the old file is untouched


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    spartan.save(model, tmp_path / "x.safetensors", compress=False)
    assert "1.weight" not in load_file(tmp_path / "x.safetensors")
    other = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    other[1].weight = other[0].weight
    spartan.load(tmp_path / "x.safetensors", other)
    assert torch.equal(other[1].weight, model[0].weight)


def test_names_that_would_clash(tmp_path: Path) -> None:
    state = {"w": pruned(64, 64), "w.gaps": torch.ones(3), "w.compressed": torch.zeros(3)}
    spartan.save(state, tmp_path / "x.safetensors")
    back = spartan.load(tmp_path / "x.safetensors")
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_files_of_compressed_tensors_load(tmp_path: Path) -> None:
    w = pruned(16, 20, density=0.3, dtype=torch.bfloat16)
    bitmask = np.packbits((w != 0).numpy(), axis=-1, bitorder="little")
    save_file(
        {
            "layer.weight.shape": torch.tensor(w.shape),
            "layer.weight.compressed": w[w != 0],
            "layer.weight.bitmask": torch.from_numpy(bitmask),
            "layer.weight.row_offsets": torch.zeros(16, 1, dtype=torch.int64),
        },
        tmp_path / "x.safetensors",
    )
    assert torch.equal(spartan.load(tmp_path / "x.safetensors")["layer.weight"], w)


def test_ordinary_files_load(tmp_path: Path) -> None:
    model = nn.Linear(5, 3)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    other = nn.Linear(5, 3)
    spartan.load(tmp_path / "x.safetensors", other)
    assert torch.equal(other.weight, model.weight)


def test_files_without_batch_counters_load(tmp_path: Path) -> None:
    norm, other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    norm.running_mean.fill_(3.0)
    state = {k: v for k, v in norm.state_dict().items() if k != "num_batches_tracked"}
    save_file(state, tmp_path / "x.safetensors")
    spartan.load(tmp_path / "x.safetensors", other)
    assert torch.equal(other.running_mean, norm.running_mean)


def test_a_wrong_model_is_refused_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    spartan.save(nn.Linear(64, 32), path)
    for model in (
        nn.Linear(64, 33),
        nn.Linear(64, 32, bias=False),
        nn.Sequential(nn.Linear(64, 32)),
    ):
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(DeployError, match="not a file of this model"):
            spartan.load(path, model)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


LAYOUT_CASES = {
    "bitmask": pruned(64, 61, density=0.5),
    "gaps": pruned(64, 64, density=0.05),
    "blocks": torch.randn(64, 64) * (torch.rand(4, 64) < 0.2).repeat_interleave(16, 0) + 0.0,
    "2:4": torch.tensor([1.0, 2.0, 0.0, 0.0] * 1024).view(64, 64),
    "columns": pruned(4, 64, density=0.3),
}


def rewrite(path: Path, edit: Any) -> None:
    """Edit the arrays and metadata of a file."""
    with safe_open(path, "np") as file:
        arrays = {key: file.get_tensor(key).copy() for key in file.keys()}  # noqa: SIM118
        metadata = {k: v for k, v in file.metadata().items() if k != "spartan.crc32"}
    edit(arrays, metadata)
    from safetensors.numpy import save_file as save_numpy

    save_numpy(arrays, path, metadata)


def force(layout: Layout, state: dict[str, Tensor], path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("spartan.deploy.layouts.LAYOUTS", (layout,))
    spartan.save(state, path)


def widen(arrays: Any, part: str, more: int) -> None:
    """Make an array of indices U64, the first of them beyond what int64 holds."""
    wide = arrays[f"w.{part}"].astype(np.uint64)
    wide[0] += np.uint64(more)
    arrays[f"w.{part}"] = wide


DAMAGE: list[tuple[str, str, Any]] = [
    ("bitmask", "values", lambda a: a.update({"w.compressed": a["w.compressed"][:-1]})),
    ("bitmask", "size", lambda a: a.update({"w.bitmask": a["w.bitmask"][:, :-1]})),
    ("bitmask", "past the end", lambda a: a["w.bitmask"].__ior__(128)),
    ("gaps", "past its end", lambda a: a["w.gaps"].__ior__(255)),
    ("gaps", "values", lambda a: a.update({"w.gaps": a["w.gaps"][:-1]})),
    ("columns", "out of", lambda a: a["w.columns"].__setitem__(0, 60_000)),
    ("columns", "out of order", lambda a: a["w.columns"].__imul__(0)),
    ("columns", "out of range", lambda a: a["w.row_starts"].__imul__(-1)),
    ("columns", "nobody writes", lambda a: a.update({"w.columns": a["w.columns"].view("i2") - 9})),
    ("columns", "nobody writes", lambda a: widen(a, "columns", 1 << 63)),
    ("columns", "nobody writes", lambda a: widen(a, "row_starts", 1 << 63)),
    ("columns", "out of range", lambda a: a["w.row_starts"].__setitem__(1, -(1 << 31))),
    ("columns", "do not rise", lambda a: a["w.row_starts"].__setitem__(1, (1 << 31) - 1)),
    ("columns", "dimensions", lambda a: a.update({"w.columns": a["w.columns"][:, None]})),
    ("columns", "dimensions", lambda a: a.update({"w.row_starts": np.array(3)})),
    ("columns", "row starts", lambda a: a["w.row_starts"].__iadd__(1)),
    ("blocks", "divide", lambda a: a.update({"w.compressed": a["w.compressed"][:, :-1]})),
    ("blocks", "values", lambda a: a.update({"w.compressed": a["w.compressed"][:-1]})),
    ("2:4", "same place", lambda a: a["w.places"].__imul__(0)),
    ("2:4", "size", lambda a: a.update({"w.places": a["w.places"][:-1]})),
]


@pytest.mark.parametrize(("name", "reason", "damage"), DAMAGE)
def test_contradictions_are_refused_before_anything_changes(
    name: str, reason: str, damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, w = tmp_path / "x.safetensors", LAYOUT_CASES[name]
    force(
        next(la for la in LAYOUTS if la.name == name),
        {"a": torch.ones(4), "w": w},
        path,
        monkeypatch,
    )
    assert torch.equal(spartan.load(path)["w"], w)

    rewrite(path, lambda arrays, _: damage(arrays))
    model = nn.ParameterDict(
        {"a": nn.Parameter(torch.zeros(4)), "w": nn.Parameter(torch.zeros_like(w))}
    )
    with pytest.raises(FileError, match=reason):
        spartan.load(path, model)
    assert all(not p.any() for p in model.parameters())
    with pytest.raises(FileError, match=reason):
        spartan.load(path)


def set_metadata(**changes: Any) -> Any:
    def edit(arrays: Any, metadata: Any) -> None:
        metadata["spartan.packed"] = json.dumps(
            {**json.loads(metadata["spartan.packed"]), **changes}
        )

    return edit


@pytest.mark.parametrize(
    ("reason", "edit"),
    [
        ("version", set_metadata(version=99)),
        ("unknown layout", set_metadata(tensors={"w": {"layout": "magic", "dtype": "F32"}})),
        ("unknown layout", set_metadata(tensors={"w": {"layout": "gaps", "dtype": "F99"}})),
        ("claims to be U8", set_metadata(tensors={"w": {"layout": "gaps", "dtype": "U8"}})),
        ("claims to be F16", set_metadata(tensors={"w": {"layout": "gaps", "dtype": "F16"}})),
        ("max_bytes", lambda arrays, _: arrays.update({"w.shape": np.array([1 << 14, 1 << 13])})),
        ("damaged", lambda arrays, _: arrays.update({"w.shape": np.array([0, 1 << 60])})),
        ("lacks", set_metadata(tensors={"v": {"layout": "gaps", "dtype": "F32"}})),
        ("not there", set_metadata(aliases={"v": "nowhere"})),
        ("damaged", set_metadata(tensors=[1, 2])),
        ("damaged", lambda arrays, metadata: metadata.update({"spartan.packed": "{"})),
        ("lacks w.gaps", lambda arrays, _: arrays.pop("w.gaps")),
        ("bytes", lambda arrays, _: arrays.update({"w.shape": np.array([1 << 24, 1 << 24])})),
        ("shape", lambda arrays, _: arrays.update({"w.shape": np.array([-64, -64])})),
        ("shape", lambda arrays, _: arrays.update({"w.shape": np.ones(400, np.int64)})),
        ("integers", lambda arrays, _: arrays.update({"w.gaps": np.ones(9, np.float32)})),
        ("shape", lambda arrays, _: arrays.update({"w.shape": np.array([0, 1 << 62, 1 << 62])})),
        ("metadata", set_metadata(tensors={"w": 5})),
        ("metadata", set_metadata(tensors={"w": {"layout": ["gaps"], "dtype": "F32"}})),
        ("metadata", set_metadata(aliases={"v": ["w"]})),
        ("one name", set_metadata(aliases={"w": "w"})),
        ("name of its own", lambda arrays, _: arrays.update({"w": np.ones(3)})),
        ("damaged", lambda _, metadata: metadata.update({"spartan.packed": "[" * 10**5})),
        ("claims", lambda arrays, _: arrays.update({"w.compressed": np.ones(3, np.complex64)})),
    ],
)
def test_hostile_files_are_refused(reason: str, edit: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    spartan.save({"w": LAYOUT_CASES["gaps"]}, path)
    rewrite(path, edit)
    with pytest.raises(FileError, match=reason):
        spartan.load(path)


def test_a_small_file_becomes_a_large_tensor_only_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    spartan.save({"w": torch.zeros(1 << 14, 1 << 11)}, path)
    with pytest.raises(FileError, match="would become 134,217,728 bytes"):
        spartan.load(path)
    assert spartan.load(path, max_bytes=1 << 28)["w"].shape == (1 << 14, 1 << 11)


@pytest.mark.parametrize("size", [0, 7, 50, 300, -1])
def test_truncated_files_are_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    spartan.save({"w": LAYOUT_CASES["gaps"]}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FileError, match="damaged"):
        spartan.load(path)
    with pytest.raises(FileError, match="no file"):
        spartan.load(tmp_path / "missing")


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"a": one, "b": one}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(FileError, match="damaged"):
        spartan.load(path)


def test_tensors_are_unpacked_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    spartan.save({"a": pruned(64, 64), "b": torch.ones(3)}, path)
    packed = PackedTensors(path)
    assert packed.shapes == {"a": (64, 64), "b": (3,)}
    assert torch.equal(packed["a"], pruned(64, 64))
    with pytest.raises(KeyError):
        packed["a.gaps"]


def test_sparse_tensors_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="dense"):
        spartan.save({"w": torch.eye(3).to_sparse()}, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_the_numpy_reader_of_the_docs_reads_every_layout(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "deployment.md"
    (block,) = (b for b in blocks_of(page) if "def unpack" in b)
    names: dict[str, Any] = {}
    exec(block.partition("\nassert")[0], names)
    path, state = tmp_path / "x.safetensors", {"w": LAYOUT_CASES[name], "a": torch.ones(4)}
    force(next(la for la in LAYOUTS if la.name == name), state, path, monkeypatch)
    arrays = names["unpack"](path)
    assert all(np.array_equal(arrays[key], state[key].numpy()) for key in state)


def test_a_mapping_that_makes_its_tensors_anew(tmp_path: Path) -> None:
    class Lazy(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            return torch.full((100, 100), float(name))

        def __iter__(self) -> Iterator[str]:
            return iter("1234")

        def __len__(self) -> int:
            return 4

    spartan.save(Lazy(), tmp_path / "x.safetensors")
    back = spartan.load(tmp_path / "x.safetensors")
    assert all(bool((back[name] == float(name)).all()) for name in "1234")


def test_ties_survive_repacking(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    spartan.save(model, first)
    spartan.save(PackedTensors(first), second)
    assert abs(second.stat().st_size - first.stat().st_size) <= 8
    back = spartan.load(second)
    assert back["1.weight"] is back["0.weight"]


@pytest.mark.parametrize(
    ("state", "metadata", "reason"),
    [
        ({"a": torch.ones(2)}, {"step": 5}, "texts"),
        ({"a": torch.ones(2)}, {"spartan.packed": "x"}, "texts"),
        ({"__metadata__": torch.ones(2)}, None, "__metadata__"),
        ({"a": torch.ones(2, device="meta")}, None, "meta"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, None, "complex128"),
        ({"a": 3}, None, "int"),
    ],
)
def test_what_cannot_be_saved(state: Any, metadata: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=reason):
        spartan.save(state, tmp_path / "x.safetensors", metadata=metadata)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    spartan.save({"a": torch.ones(4), "b": torch.ones(4)}, path)
    model = nn.Module()
    model.register_buffer("a", torch.zeros(4))
    model.register_buffer("b", torch.zeros(1).expand(4))
    with pytest.raises(DeployError, match="expanded"):
        spartan.load(path, model)
    assert not model.a.any()
    model.b = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(DeployError, match="int64"):
        spartan.load(path, model)


def test_long_names_do_not_make_files_larger(tmp_path: Path) -> None:
    packed, plain = tmp_path / "packed.safetensors", tmp_path / "plain.safetensors"
    for rows in (4, 8, 14, 20):
        state = {f"{'n' * 240}{i}": pruned(rows, 16, density=0.5) for i in range(20)}
        spartan.save(state, packed)
        spartan.save(state, plain, compress=False)
        assert packed.stat().st_size <= plain.stat().st_size


def test_threads_may_save_to_one_path(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    states = [{"w": torch.full((50, 50), float(i))} for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda state: spartan.save(state, path), states * 5))
    assert int(spartan.load(path)["w"].unique()) in range(8)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_transformers_reads_is_not_packed(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    with torch.no_grad():
        model.weight[torch.rand(64, 64) > 0.1] = 0.0
    path = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DeployError, match="from_pretrained"):
        spartan.save(model, path)
    assert not path.exists()
    spartan.save(model, path, compress=False)
    spartan.save(model, tmp_path / "packed.safetensors")
    for text in ('{"data": "digits"}', "{", "[]"):  # folders of others
        (tmp_path / "config.json").write_text(text)
        spartan.save(model, path)
