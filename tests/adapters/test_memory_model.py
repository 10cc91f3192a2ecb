"""The memory on models of many makes, and what it says about itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spartan.adapters import (
    HoulsbyConfig,
    LoraConfig,
    MemoryConfig,
    MemoryModel,
    PfeifferConfig,
    ProbeConfig,
    find_layers,
    get_adapter_model,
    get_memory_model,
)
from spartan.adapters.specialization import specialization
from spartan.errors import AdapterError
from tests.adapters.models import digest, encoder, family, hidden, inputs, stir

FAMILIES = ["bert", "roberta", "distilbert", "electra", "deberta", "deberta-v2", "mpnet", "vit",
            "gpt2", "llama"]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_identity_at_start_and_hidden_states(name: str) -> None:
    base = family(name)
    expected, before = hidden(base, inputs(name)), digest(base)
    with torch.no_grad():  # transformers installs its recorders at the first such call
        base(**inputs(name), output_hidden_states=True)
    model = get_memory_model(base).eval()
    assert torch.equal(hidden(model, inputs(name)), expected)
    # (N + 2 M) H for each layer
    assert model.get_nb_trainable_parameters()[0] == 3 * (16 + 2 * 48) * 32
    stir(model)
    seen: list[Tensor] = []
    layers = find_layers(base, "all")
    handles = [
        layer.module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        for layer in layers
    ]
    with torch.no_grad():
        output = model(**inputs(name), output_hidden_states=True)
    for handle in handles:
        handle.remove()
    assert not torch.equal(output.last_hidden_state, expected)
    # What is recorded is what the next layer gets: the states after the memory.
    for recorded, got in zip(output.hidden_states[1:-1], seen[1:], strict=True):
        assert torch.equal(recorded, got)
    assert digest(base) == before
    assert torch.equal(hidden(model.unload(), inputs(name)), expected)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "config", [HoulsbyConfig(size=4), PfeifferConfig(size=4), LoraConfig(rank=2)],
    ids=lambda c: c.name,
)  # fmt: skip
def test_baselines_reach_every_family(name: str, config: Any) -> None:
    base = family(name)
    expected = hidden(base, inputs(name))
    model = get_adapter_model(base, config).eval()
    counted = {"houlsby": 2, "pfeiffer": 1}.get(config.name)
    if counted:  # two matrices and two biases each
        assert model.get_nb_trainable_parameters()[0] == 3 * counted * (2 * 32 * 4 + 4 + 32)
    stir(model)
    assert not torch.equal(hidden(model, inputs(name)), expected)
    assert torch.equal(hidden(model.unload(), inputs(name)), expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    "config", [MemoryConfig(train_layernorm=True), HoulsbyConfig(size=4), PfeifferConfig(size=4)],
    ids=lambda c: c.name,
)  # fmt: skip
def test_torch_encoders(config: Any, batch_first: bool, norm_first: bool) -> None:
    base = encoder(batch_first, norm_first)
    x = torch.randn(2, 7, 32)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    x = x if batch_first else x.transpose(0, 1)

    def outputs(model: nn.Module, grad: bool = False) -> Tensor:
        with torch.set_grad_enabled(grad):
            out = model(x, src_key_padding_mask=padding)
        out = out if batch_first else out.transpose(0, 1)
        return out[~padding[:, : out.shape[1]]]

    expected = outputs(base)
    model = get_adapter_model(base, config).eval()
    stir(model)
    # torch's fused layers, which run without gradients only, must not go past the adapter.
    torch.testing.assert_close(outputs(model), outputs(model, grad=True), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs(model), expected, atol=1e-3)
    assert torch.equal(outputs(model.unload()), expected)


def test_padding_does_not_count() -> None:
    model = get_memory_model(encoder(batch_first=False), MemoryConfig(balance_loss=2.0)).eval()
    stir(model)
    x, padding = torch.randn(7, 2, 32), torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    batch = {"src": x, "src_key_padding_mask": padding}
    usage = model.memory_usage(batch)
    assert [tuple(u.shape) for u in usage.values()] == [(2, 16)] * 3
    for shares in usage.values():
        torch.testing.assert_close(shares.sum(1), torch.ones(2))
    x = x.clone()
    x[4:, 1] = 100.0
    for path, shares in model.memory_usage({**batch, "src": x}).items():
        torch.testing.assert_close(shares, usage[path])
    model.train()
    losses = []
    for filling in (-5.0, 5.0):
        x[4:, 1] = filling
        model(**{**batch, "src": x})
        losses.append(model.balance_loss(~padding))
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[0].requires_grad


def test_the_balance_loss_is_least_where_all_parents_are_used_alike() -> None:
    model = get_memory_model(encoder(), MemoryConfig(balance_loss=1.0, num_parents=4, top_k=4))
    memories = model.adapters["default"].add_ons
    x = torch.randn(2, 5, 32)
    for memory in memories:
        memory.parents.data.zero_()
    model.train()(x)
    assert model.balance_loss().item() == pytest.approx(1 / 4**2)
    one = get_memory_model(encoder(), MemoryConfig(balance_loss=1.0, num_parents=4, top_k=1))
    for memory in one.adapters["default"].add_ons:
        memory.parents.data.zero_()  # all logits tie, and the first parent wins
    one.train()(x)
    assert one.balance_loss().item() == pytest.approx(1 / 4)


def test_the_balance_loss_joins_the_loss_of_the_model() -> None:
    labels = torch.tensor([0, 1])
    config = MemoryConfig(balance_loss=3.0, modules_to_save=["classifier"])
    model: MemoryModel = get_memory_model(family("bert", head=True), config).train()
    loss = model(**inputs("bert"), labels=labels).loss
    expected = model.balance_loss(inputs("bert")["attention_mask"].bool())
    without = get_memory_model(
        family("bert", head=True), MemoryConfig(modules_to_save=["classifier"])
    )
    plain = without.eval()(**inputs("bert"), labels=labels).loss
    torch.testing.assert_close(loss, plain + expected)
    with pytest.raises(AdapterError, match="balance_loss"):
        without.balance_loss()


def test_other_models_by_path() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x).relu()
            return x

    with pytest.raises(AdapterError, match="No transformer layers were found in Mixer"):
        get_memory_model(Mixer())
    with pytest.raises(AdapterError, match="hidden_size"):
        get_memory_model(Mixer(), MemoryConfig(target_layers="blocks"))
    base, x = Mixer(), torch.randn(2, 5, 8)
    for target, count in [("blocks", 3), (["blocks.0", "blocks.2"], 2), ("blocks.*", 3)]:
        model = get_memory_model(base, MemoryConfig(target_layers=target, hidden_size=8))
        assert len(model.adapters["default"].paths) == count
        assert torch.equal(model(x), model.unload()(x))
    wrong = get_memory_model(base, MemoryConfig(target_layers="blocks", hidden_size=9))
    with pytest.raises(AdapterError, match="hidden states of 9 entries; Linear gives 8"):
        wrong(x)


def test_a_star_is_one_part_of_a_path() -> None:
    model = get_memory_model(encoder(), MemoryConfig(target_layers="layers.*"))
    assert model.adapters["default"].paths == ["layers.0", "layers.1", "layers.2"]
    bert = family("bert")
    lora = get_adapter_model(bert, LoraConfig(rank=2, target_layers="encoder.layer.*"))
    assert len(lora.adapters["default"].paths) == 2 * 3
    lora.unload()
    with pytest.raises(AdapterError, match="overlap"):
        get_adapter_model(bert, LoraConfig(target_layers=["encoder", "encoder.layer"]))


def test_encoder_and_decoder_ask_for_a_choice() -> None:
    both = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
    with pytest.raises(AdapterError, match=r"encoder\.layers, decoder\.layers"):
        get_memory_model(both)
    get_memory_model(both, MemoryConfig(target_layers="decoder.layers"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 17}, "top_k=17 must be from 1 to num_parents=16"),
        ({"top_k": 0}, "top_k=0"),
        ({"children_per_parent": 0}, "children_per_parent=0 must be a whole number of at least 1"),
        ({"num_parents": "16"}, "num_parents='16' must be a whole number"),
        ({"top_k": True}, "top_k=True"),
        ({"hidden_size": -3}, "hidden_size=-3"),
        ({"temperature": float("inf")}, "temperature"),
        ({"balance_loss": float("nan")}, "balance_loss"),
        ({"modules_to_save": None}, "must be a list"),
        ({"modules_to_save": [1.5]}, "names or numbers"),
        ({"target_layers": 0}, "must be a list"),
        ({"num_parents": 0}, "num_parents=0"),
        ({"temperature": 0.0}, "temperature"),
        ({"balance_loss": -1.0}, "balance_loss"),
        ({"init": "zeros"}, "init"),
        ({"modules_to_save": "classifier"}, "must be a list"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        MemoryConfig(**settings)
    with pytest.raises(ValueError, match=words):
        MemoryConfig(**settings)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MemoryConfig(target_layers="encoder.layrs"), "did you mean 'layers"),
        (MemoryConfig(target_layers=[3]), "layer 3; there are 3, 0 to 2"),
        (MemoryConfig(target_layers=[]), "empty"),
        (MemoryConfig(target_layers=[0, "layers.1"]), "must be 'all', numbers, or paths"),
        (MemoryConfig(modules_to_save=["classifer"]), "which TransformerEncoder does not have"),
        (ProbeConfig(), "nothing to train"),
        (MemoryConfig(modules_to_save=["layers"]), "trains 'layers' whole, but 'layers.0'"),
        (LoraConfig(), "target_modules"),
        (
            LoraConfig(target_modules=["out_proj"]),
            "choose 'layers.0.self_attn'",
        ),
        (ProbeConfig(modules_to_save=["out_proj"]), "without calling it"),
        (MemoryConfig(target_layers=["layers", "layers.*.nothing"]), "does not have"),
    ],
)
def test_what_does_not_fit_leaves_the_model_alone(config: Any, words: str) -> None:
    base = encoder()
    with pytest.raises(AdapterError, match=words):
        get_adapter_model(base, config)
    assert all(p.requires_grad for p in base.parameters())
    assert not any(m._forward_hooks for m in base.modules())


def test_names_and_kinds_of_adapters() -> None:
    model = get_memory_model(encoder())
    for name in ("a.b", "", "pop", "training"):
        with pytest.raises(AdapterError, match="cannot be an adapter's name"):
            model.add_adapter(name, MemoryConfig())
    with pytest.raises(AdapterError, match="already"):
        model.add_adapter("default", MemoryConfig())
    with pytest.raises(AdapterError, match="takes a MemoryConfig"):
        model.add_adapter("other", HoulsbyConfig())
    with pytest.raises(AdapterError, match="did you mean 'default'"):
        model.set_adapter("defalt")
    with pytest.raises(AdapterError, match="the only adapter"):
        model.delete_adapter("default")
    for adapted in (model, model.get_base_model()):
        with pytest.raises(AdapterError, match="has adapters already"):
            get_memory_model(adapted)


def test_printed_count(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_memory_model(encoder())
    model.print_trainable_parameters()
    total = 10_752 + sum(p.numel() for p in encoder().parameters())
    words = f"trainable params: 10,752 || all params: {total:,} || trainable: "
    assert capsys.readouterr().out.startswith(words)


def test_specialization_finds_what_is_there_and_nothing_else() -> None:
    torch.manual_seed(0)
    labels = torch.arange(120) % 3
    usage = 0.02 * torch.rand(120, 6)
    usage[torch.arange(120), 2 * labels] += 1
    found = specialization(usage / usage.sum(1, keepdim=True), labels, 3)
    assert found.bits > 1.2
    assert found.p == pytest.approx(1 / 200)
    assert found.shares.argmax(1).tolist() == [0, 2, 4]
    nothing = specialization(torch.rand(120, 6).softmax(1), labels, 3)
    assert nothing.p > 0.05
    assert nothing.bits == pytest.approx(nothing.by_chance, abs=0.01)
