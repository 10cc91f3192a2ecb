"""`SparsifierCallback` in the real `Trainer`: fresh, resumed, best, stopped, extended, saved."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from spartan import Budget
from spartan.errors import BudgetError, ScheduleError, StateError
from spartan.methods import GSE, ConstrainedL0, Magnitude, Spartan
from tests.conftest import leave

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from spartan import always_sparse  # noqa: E402
from spartan.integrations.transformers import SparsifierCallback  # noqa: E402

METHODS: dict[str, Callable[[], Any]] = {
    "spartan": Spartan,
    "magnitude": Magnitude,
    "gates": lambda: ConstrainedL0(gate_lr=1.0),
    "gse": lambda: GSE(period=3),
}
STEPS, SAVED = 24, 4
pytestmark = pytest.mark.filterwarnings(
    "ignore:The gates of .* reached an expected density",
    "ignore:.* output units? .* no connection",
)


def bert(grows: bool = False) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=20, intermediate_size=32, max_position_embeddings=8, num_labels=2, **sizes
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return always_sparse.convert(model, 0.25) if grows else model


def examples(count: int = 64) -> list[dict[str, Any]]:
    words = torch.randint(20, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": int(row.sum()) % 2} for row in words]


def train(
    folder: Path,
    method: str = "spartan",
    *,
    resume: Path | None = None,
    steps: int = STEPS,
    callbacks: tuple[Any, ...] = (),
    metrics: Any = None,
    **arguments: Any,
) -> tuple[Any, SparsifierCallback]:
    pruning = SparsifierCallback(METHODS[method](), Budget(density=0.25))
    trainer = trainer_of(
        folder, method, [pruning, *callbacks], max_steps=steps, metrics=metrics, **arguments
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer, pruning


def trainer_of(
    folder: Path, method: str, callbacks: list[Any], metrics: Any = None, **arguments: Any
) -> Any:
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": 8, "save_steps": SAVED,
        "logging_steps": SAVED, "use_cpu": True, "disable_tqdm": True, "report_to": [],
        "learning_rate": 1e-2, "save_strategy": "steps",
    }  # fmt: skip
    return transformers.Trainer(
        bert(method == "gse"),
        transformers.TrainingArguments(str(folder), **{**settings, **arguments}),
        train_dataset=examples(),
        eval_dataset=examples(8),
        callbacks=callbacks,
        compute_metrics=metrics,
    )


def kept(model: nn.Module, pruning: SparsifierCallback) -> int:
    assert pruning.sparsifier is not None
    names = {weight.name.replace(".values", ".weight") for weight in pruning.sparsifier.weights}
    named = dict(model.named_parameters())
    return sum(int(named[name].count_nonzero()) for name in names)


def total(pruning: SparsifierCallback) -> int:
    assert pruning.sparsifier is not None
    return sum(budget.kept for _, budget in pruning.sparsifier.budgets())  # type: ignore[misc]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_resumed_anywhere_is_the_same_run(method: str, tmp_path: Path) -> None:
    whole, pruning = train(tmp_path / "whole", method)
    assert pruning.sparsifier is not None
    assert pruning.sparsifier.step == STEPS
    exact = kept(whole.model, pruning)
    assert exact == total(pruning) if method != "gse" else exact <= total(pruning)
    for step in (4, 12, 20):  # on the way, while masks move, and after they are fixed
        place = tmp_path / "whole" / f"checkpoint-{step}"
        again, _ = train(tmp_path / "again", method, resume=place, save_strategy="no")
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, again.model.state_dict()[name]), (step, name)
    folder = str(tmp_path / "final")
    whole.save_model(folder)
    loaded, told = type(bert()).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values())
    assert kept(loaded, pruning) == exact


def test_the_log_holds_what_the_sparsifier_does(tmp_path: Path) -> None:
    trainer, pruning = train(tmp_path, save_strategy="no")
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert all({"spartan/beta", "spartan/churn", "spartan/kept"} <= set(row) for row in rows)
    densities = [row["spartan/density"] for row in rows]
    assert densities == sorted(densities, reverse=True)
    assert rows[-1]["spartan/kept"] == total(pruning)
    assert rows[0]["spartan/churn"] > 0 == rows[-1]["spartan/churn"]


def test_the_best_model_is_one_at_the_budget(tmp_path: Path) -> None:
    scores = iter([9.0, 5.0, 8.0, 7.0, 6.0, 6.0])  # the best comes before the budget is reached
    trainer, pruning = train(
        tmp_path, metrics=lambda _: {"score": next(scores)}, eval_strategy="steps",
        eval_steps=SAVED, load_best_model_at_end=True, metric_for_best_model="score",
        greater_is_better=True,
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-12")
    assert kept(trainer.model, pruning) == total(pruning)
    best = type(bert()).from_pretrained(trainer.state.best_model_checkpoint)
    for one, other in zip(trainer.model.parameters(), best.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_that_stops_early_is_exact_and_told(tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    with pytest.warns(UserWarning, match="before the schedule"):
        trainer, pruning = train(tmp_path, callbacks=(Stop(),), save_strategy="no")
    assert kept(trainer.model, pruning) == total(pruning)


@pytest.mark.parametrize("method", ["spartan", "gse"])
def test_a_run_that_broke_off_goes_on_in_the_same_trainer(method: str, tmp_path: Path) -> None:
    class Break(transformers.TrainerCallback):  # type: ignore[misc]
        broken = False

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 14 and not self.broken:
                self.broken = True
                raise KeyboardInterrupt

    whole, _ = train(tmp_path / "whole", method, save_strategy="no")
    pruning = SparsifierCallback(METHODS[method](), Budget(density=0.25))
    trainer = trainer_of(tmp_path / "broken", method, [pruning, Break()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.warns(UserWarning, match="that one ends here"):
        trainer.train(resume_from_checkpoint=True)
    assert pruning.sparsifier is not None
    assert pruning.sparsifier.step == STEPS
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name]), name


@pytest.mark.parametrize(("done", "told"), [(8, "the rest of the schedule"), (20, "fixed already")])
def test_more_steps_than_planned_are_told_and_exact(done: int, told: str, tmp_path: Path) -> None:
    train(tmp_path / "first")
    place = tmp_path / "first" / f"checkpoint-{done}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, pruning = train(tmp_path / "more", resume=place, steps=36, save_strategy="no")
    assert any(told in str(one.message) for one in caught)
    assert pruning.sparsifier is not None
    assert pruning.sparsifier.step == 36
    assert kept(trainer.model, pruning) == total(pruning)


def test_half_precision_accumulation_and_clipping(tmp_path: Path) -> None:
    trainer, pruning = train(
        tmp_path, bf16=True, gradient_accumulation_steps=2, max_grad_norm=0.1, save_strategy="no"
    )
    assert pruning.sparsifier is not None
    assert pruning.sparsifier.step == STEPS
    assert kept(trainer.model, pruning) == total(pruning)


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(BudgetError):
        transformers.Trainer(
            bert(),
            transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
            train_dataset=examples(),
            callbacks=[SparsifierCallback("spartan", 1.5)],
        ).train()
    train(tmp_path / "one")
    shutil.copytree(tmp_path / "one" / "checkpoint-4", tmp_path / "two")
    with pytest.raises(StateError, match="method="):
        train(tmp_path / "other", "magnitude", resume=tmp_path / "two")
    with pytest.raises((ScheduleError, ValueError)):
        train(tmp_path / "none", steps=0, num_train_epochs=0)


def _process(rank: int, folder: Path, port: int) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    half = {"ddp_backend": "gloo", "per_device_train_batch_size": 4}
    trainer, pruning = train(folder, **half)
    again, _ = train(folder, resume=folder / "checkpoint-12", **half)
    states = [{k: v.clone() for k, v in one.model.state_dict().items()} for one in (trainer, again)]
    torch.save((*states, kept(trainer.model, pruning), total(pruning)), folder / f"{rank}.pt")
    leave(dist)


def test_two_processes(tmp_path: Path, free_port: int) -> None:
    mp.spawn(_process, (tmp_path, free_port), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first[2] == first[3] == second[2]
    for other in (first[1], second[0], second[1]):
        assert all(torch.equal(value, other[name]) for name, value in first[0].items())
