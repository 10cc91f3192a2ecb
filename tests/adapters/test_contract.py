"""What every adapter must do: one row each."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spartan.adapters import (
    ADAPTERS,
    AdapterConfig,
    AdapterModel,
    FullConfig,
    HoulsbyConfig,
    LayerNormConfig,
    LoraConfig,
    MemoryConfig,
    PfeifferConfig,
    ProbeConfig,
    get_adapter_model,
)
from spartan.errors import AdapterError, FileError
from tests.adapters.models import digest, family, inputs, stir

HEAD = ("classifier",)
ROWS: list[AdapterConfig] = [
    MemoryConfig(modules_to_save=HEAD),
    MemoryConfig(init="normal", train_layernorm=True, target_layers=(0, -1)),
    HoulsbyConfig(size=4, modules_to_save=HEAD),
    PfeifferConfig(size=4, modules_to_save=HEAD),
    LoraConfig(rank=2, modules_to_save=HEAD),
    LayerNormConfig(modules_to_save=HEAD),
    ProbeConfig(modules_to_save=HEAD),
    FullConfig(),
]
each = pytest.mark.parametrize("config", ROWS, ids=[f"{i}-{r.name}" for i, r in enumerate(ROWS)])


def test_every_adapter_has_a_row() -> None:
    assert {row.name for row in ROWS} == set(ADAPTERS)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs("bert")).logits


@each
def test_training_leaves_the_backbone_alone(config: AdapterConfig) -> None:
    base = family("bert", head=True)
    before, keys, outputs = digest(base), list(base.state_dict()), logits(base)
    model = get_adapter_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == model.get_nb_trainable_parameters()[0] > 0
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**inputs("bert"), labels=torch.tensor([1, 3])).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(p.grad is None for p in base.parameters())
    assert digest(base) == before
    assert list(base.state_dict()) == keys
    assert not torch.equal(logits(model.eval()), outputs)
    with model.disable_adapter():
        assert torch.equal(logits(model), outputs)
        assert torch.equal(logits(base), outputs)
    assert torch.equal(logits(base), logits(model))
    plain = model.unload()
    assert plain is base
    assert torch.equal(logits(plain.eval()), outputs)
    assert all(p.requires_grad for p in plain.parameters())
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in plain.modules())


@each
def test_saved_and_loaded(config: AdapterConfig, tmp_path: Path) -> None:
    model = get_adapter_model(family("bert", head=True), config).eval()
    stir(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    # Headers name each tensor; nothing else is on disk.
    floats = 4 * model.get_nb_trainable_parameters()[0]
    assert floats <= files["adapter_model.safetensors"] <= floats + 20_000
    again = AdapterModel.from_pretrained(family("bert", head=True), tmp_path).eval()
    assert torch.equal(logits(again), expected)
    assert not any(p.requires_grad for p in again.parameters())


@each
def test_copied_and_pickled(config: AdapterConfig) -> None:
    model = get_adapter_model(family("bert", head=True), config).eval()
    stir(model)
    expected = logits(model)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert torch.equal(logits(other), expected)
        for parameter in other.adapters.parameters():
            parameter.data.zero_()
        assert torch.equal(logits(model), expected)
        assert not torch.equal(logits(other), expected)
        other.unload()
    assert torch.equal(logits(model), expected)


@each
def test_two_adapters_do_not_meet(config: AdapterConfig, tmp_path: Path) -> None:
    base = family("bert", head=True)
    model: AdapterModel = AdapterModel(base, ProbeConfig(modules_to_save=HEAD), "first").eval()
    stir(model)
    first = logits(model)
    model.add_adapter("second", config)
    stir_one = model.adapters["second"]
    torch.manual_seed(3)
    for parameter in stir_one.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert model.active_adapters == ["second"]
    second = logits(model)
    assert not torch.equal(second, first)
    model.set_adapter("first")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "third")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    model.set_adapter("third")
    assert torch.equal(logits(model), second)
    with pytest.raises(AdapterError, match="already"):
        model.load_adapter(tmp_path, "third")


@each
def test_merging(config: AdapterConfig) -> None:
    model = get_adapter_model(family("bert", head=True), config).eval()
    stir(model)
    expected, before = logits(model), digest(model.base_model)
    if config.name in ("memory", "houlsby", "pfeiffer"):
        with pytest.raises(AdapterError, match="depends on its input"):
            model.merge_and_unload()
        assert digest(model.base_model) == before
        assert torch.equal(logits(model), expected)
    else:
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_backbones_of_other_precision(
    config: AdapterConfig, autocast: bool, dtype: torch.dtype
) -> None:
    model = get_adapter_model(family("bert", head=True).to(dtype), config)
    expected = torch.float32 if dtype is torch.bfloat16 else dtype
    assert {p.dtype for p in model.adapters.parameters()} == {expected}
    if autocast and dtype is torch.float64:
        pytest.skip("autocast leaves float64 alone")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model.train()(**inputs("bert"), labels=torch.tensor([1, 3]))
    output.loss.backward()
    assert output.logits.dtype is dtype
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_wrapping_keeps_evaluation_mode(tmp_path: Path) -> None:
    config = LoraConfig(rank=2, dropout=0.5, modules_to_save=HEAD)
    model = get_adapter_model(family("bert", head=True), config)
    stir(model)
    assert not any(module.training for module in model.modules())
    assert torch.equal(logits(model), logits(model))
    model.save_pretrained(tmp_path)
    loaded = AdapterModel.from_pretrained(family("bert", head=True), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_tied_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    def tied() -> nn.Module:
        return transformers.GPT2LMHeadModel(family("gpt2").config).eval()

    base = tied()
    parameters = sum(p.numel() for p in base.parameters())
    model = get_adapter_model(base, FullConfig())
    stir(model)
    expected = logits(model)
    assert model.get_nb_trainable_parameters()[0] == parameters
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 4 * parameters <= size <= 4 * parameters + 20_000
    assert torch.equal(logits(AdapterModel.from_pretrained(tied(), tmp_path)), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected)
    head = get_adapter_model(tied(), ProbeConfig(modules_to_save=["lm_head"]))
    stir(head)
    expected = logits(head)
    with pytest.raises(AdapterError, match="is tied to"):
        head.merge_and_unload()
    assert torch.equal(logits(head), expected)


def test_what_was_there_before_is_there_again() -> None:
    base = family("bert", head=True)
    own = base.classifier.forward
    base.classifier.forward = own  # as libraries do that place modules on devices
    get_adapter_model(base, ProbeConfig(modules_to_save=HEAD)).unload()
    assert base.classifier.__dict__["forward"] is own


def test_changes_while_disabled_last() -> None:
    model: AdapterModel = get_adapter_model(
        family("bert", head=True), ProbeConfig(modules_to_save=HEAD)
    )
    model.add_adapter("b", LoraConfig(rank=2))
    with model.disable_adapter():
        assert model.active_adapters == []
        for call in (model.merge_and_unload, lambda: model.save_pretrained("nowhere")):
            with pytest.raises(AdapterError, match="No adapter is active"):
                call()
        model.set_adapter("b")
    assert model.active_adapters == ["b"]
    with model.disable_adapter():
        model.delete_adapter("b")
    assert model.active_adapters == ["default"]


def test_training_nothing_is_refused(tmp_path: Path) -> None:
    get_adapter_model(family("bert", head=True), LoraConfig(rank=2)).save_pretrained(tmp_path)
    loaded = AdapterModel.from_pretrained(family("bert", head=True), tmp_path).train()
    batch = {**inputs("bert"), "labels": torch.tensor([1, 3])}
    with pytest.raises(AdapterError, match="is_trainable=True"):
        loaded(**batch)
    loaded.set_adapter("default", is_trainable=True)
    loaded(**batch).loss.backward()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(LoraConfig, {"rank": 2.5}), (LoraConfig, {"alpha": float("nan")}),
     (LoraConfig, {"target_modules": "query"}), (HoulsbyConfig, {"size": 0})],
)  # fmt: skip
def test_settings_of_baselines(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=next(iter(settings))):
        kind(**settings)


@each
def test_its_state_is_that_of_the_adapters(config: AdapterConfig) -> None:
    outer = nn.Sequential(get_adapter_model(family("bert", head=True), config)).eval()
    stir(outer[0])
    state = outer.state_dict()
    assert all(name.startswith("0.adapters.default.") for name in state)
    fresh = nn.Sequential(get_adapter_model(family("bert", head=True), config)).eval()
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh[0]), logits(outer[0]))
    del state[next(iter(state))]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.adapters"):
        fresh.load_state_dict(state)


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        return family("bert", head=True)

    with pytest.raises(FileError, match="holds no adapter"):
        AdapterModel.from_pretrained(fresh(), tmp_path)
    model = get_adapter_model(fresh(), MemoryConfig())
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="made for 'bert' of width 32; this model is 'gpt2'"):
        AdapterModel.from_pretrained(family("gpt2"), tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text("{")
    with pytest.raises(FileError, match="damaged"):
        AdapterModel.from_pretrained(fresh(), tmp_path / "a")
    model.save_pretrained(tmp_path / "a")
    values = json.loads(path.read_text(encoding="utf-8"))
    values["adapter"]["num_parents"] = 9
    path.write_text(json.dumps(values))
    base = fresh()
    with pytest.raises(FileError, match="not written together"):
        AdapterModel.from_pretrained(base, tmp_path / "a")
    values["adapter"] = {"name": "memories"}
    path.write_text(json.dumps(values))
    with pytest.raises(AdapterError, match="did you mean 'memory'"):
        AdapterModel.from_pretrained(base, tmp_path / "a")
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(FileError, match="damaged"):
        AdapterModel.from_pretrained(base, tmp_path / "a")
    assert all(p.requires_grad for p in base.parameters())
    assert not any(m._forward_hooks for m in base.modules())


def test_an_adapter_of_another_width_is_refused(tmp_path: Path) -> None:
    wide = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 64, batch_first=True), 3)
    narrow = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 3)
    get_adapter_model(wide, MemoryConfig()).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="does not fit this model"):
        AdapterModel.from_pretrained(narrow, tmp_path)
    assert all(p.requires_grad for p in narrow.parameters())
    assert not any(m._forward_hooks for m in narrow.modules())
