"""The memory in the company it keeps: trainers, generation, checkpointing, compilers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from spartan.adapters import MemoryConfig, MemoryModel, get_memory_model
from tests.adapters.models import digest, encoder, family, hidden, inputs, minilm, stir

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

HEAD = ["classifier"]
LABELS = torch.tensor([1, 3])


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    base = family("bert", head=True)
    before = digest(base)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 99, (48, 8), generator=generator)
    rows = {
        "input_ids": tokens.tolist(),
        "attention_mask": torch.ones_like(tokens).tolist(),
        "labels": (tokens[:, 0] > 50).long().tolist(),
        "title": ["a column the model does not take"] * 48,
    }
    model = get_memory_model(base, MemoryConfig(modules_to_save=HEAD, balance_loss=0.1))
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=8, learning_rate=0.02, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, per_device_train_batch_size=16,
        ),
        train_dataset=datasets.Dataset.from_dict(rows),
        eval_dataset=datasets.Dataset.from_dict(rows),
    )  # fmt: skip
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * first
    assert digest(base) == before
    model.save_pretrained(tmp_path / "adapter")
    again = MemoryModel.from_pretrained(family("bert", head=True), tmp_path / "adapter").eval()
    batch = inputs("bert")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


def test_the_balance_loss_is_that_of_a_step_however_it_is_accumulated(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    tokens = torch.randint(2, 99, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
    data = datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    norms = []
    for batch, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        base = transformers.GPT2LMHeadModel(family("gpt2").config)
        model = get_memory_model(base, MemoryConfig(balance_loss=1e5))
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=batch, max_grad_norm=1.0,
            gradient_accumulation_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True,
            save_strategy="no", logging_steps=1,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    # Means over less positions differ a little; four times the loss would be four times as much.
    assert norms[1] == pytest.approx(norms[0], rel=0.5)


def test_a_trainer_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    tokens = torch.randint(2, 99, (16, 8), generator=torch.Generator().manual_seed(0)).tolist()
    data = datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})

    def train(resume: bool | None) -> tuple[Any, MemoryModel]:
        torch.manual_seed(0)
        # Its head is tied to its embedding.
        base = transformers.GPT2LMHeadModel(family("gpt2").config)
        model = get_memory_model(base)
        arguments = transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=2, save_strategy="epoch", report_to=[], use_cpu=True,
            disable_tqdm=True, learning_rate=0.05,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        return trainer.train(resume_from_checkpoint=resume), model

    _, whole = train(None)
    first, last = sorted(
        tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])
    )
    saved = (first / "model.safetensors").stat().st_size
    assert saved <= 4 * whole.get_nb_trainable_parameters()[0] + 10_000
    shutil.rmtree(last)
    output, resumed = train(True)
    assert output.global_step == 4
    for ours, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_and_its_cache(name: str) -> None:
    base = getattr(transformers, {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[name])(
        family(name).config
    ).eval()
    model = get_memory_model(base).eval()
    tokens = inputs(name)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **options)
    with model.disable_adapter():
        assert torch.equal(model.generate(tokens, **options), expected)
    stir(model)
    with_cache = model.generate(tokens, **options)
    assert not torch.equal(with_cache, expected)
    assert torch.equal(model.generate(tokens, use_cache=False, **options), with_cache)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_gradient_checkpointing(reentrant: bool, balance: float) -> None:
    if reentrant and balance:
        pytest.skip("reentrant checkpoints cut off what a region hands out besides its result")
    gradients = []
    for checkpointing in (False, True):
        config = MemoryConfig(modules_to_save=HEAD, balance_loss=balance)
        model = get_memory_model(family("bert", head=True), config).train()
        stir(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**inputs("bert"), labels=LABELS).loss.backward()
        gradients.append([p.grad for p in model.adapters.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_compiled_models_follow_the_active_adapter() -> None:
    base = family("bert")
    batch = inputs("bert")
    bare = hidden(base, batch)
    model = get_memory_model(base).eval()
    stir(model)
    expected = hidden(model, batch)
    compiled: Any = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(hidden(compiled, batch), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(hidden(compiled, batch), bare, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden(compiled, batch), expected, rtol=1e-4, atol=1e-4)
    model.add_adapter("second", MemoryConfig())
    model.set_adapter("second")
    torch.testing.assert_close(hidden(compiled, batch), bare, rtol=1e-4, atol=1e-4)


def test_compiled_training() -> None:
    gradients = []
    for compiled in (False, True):
        model = get_memory_model(family("bert", head=True), MemoryConfig(modules_to_save=HEAD))
        stir(model)
        call: Any = torch.compile(model.train(), backend="aot_eager") if compiled else model.train()
        call(**inputs("bert"), labels=LABELS).loss.backward()
        gradients.append([p.grad for p in model.adapters.parameters()])
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)


def test_exported_and_traced() -> None:
    model, batch = get_memory_model(family("bert")).eval(), inputs("bert")
    stir(model)
    exported = torch.export.export(model, (), batch)
    expected = hidden(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(**batch).last_hidden_state, expected)
    example = batch["input_ids"], batch["attention_mask"]
    traced = torch.jit.trace(model, example, strict=False)
    other = {name: tensor.flip(0) for name, tensor in batch.items()}
    with torch.no_grad():
        got = traced(*other.values())["last_hidden_state"]
    torch.testing.assert_close(got, hidden(model, other), rtol=1e-4, atol=1e-5)


def test_function_transforms() -> None:
    model, x = get_memory_model(encoder()).eval(), torch.randn(3, 5, 32)
    stir(model)
    each = torch.func.vmap(lambda one: model(one[None])[0])(x)
    torch.testing.assert_close(each, model(x), rtol=1e-4, atol=1e-5)


def test_autocast() -> None:
    model = get_memory_model(family("bert")).eval()
    stir(model)
    expected = hidden(model, inputs("bert"))
    with torch.autocast("cpu", torch.bfloat16):
        got = hidden(model, inputs("bert"))
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)


def test_minilm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = transformers.AutoModel.from_pretrained(minilm()).eval()
    batch = {"input_ids": torch.tensor([[101, 4248, 2829, 4419, 102, 0]])}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    expected, before = hidden(base, batch), digest(base)
    model = get_memory_model(base).eval()
    assert torch.equal(hidden(model, batch), expected)
    assert model.get_nb_trainable_parameters()[0] == 258_048
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 1_100_000
    assert digest(model.unload()) == before
