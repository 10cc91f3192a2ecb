"""`Sparsify` in the real Lightning `Trainer`: fresh, resumed, averaged, best, stopped, extended."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from spartan import Budget
from spartan.always_sparse import SparseLinear
from spartan.errors import PrunableError, ScheduleError, StateError
from spartan.methods import GSE, ConstrainedL0, Magnitude, Spartan
from tests.conftest import leave

L = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from lightning.pytorch import callbacks as those_of_lightning  # noqa: E402

from spartan.integrations.lightning import Sparsify  # noqa: E402

METHODS: dict[str, Callable[[], Any]] = {
    "spartan": Spartan,
    "magnitude": Magnitude,
    "gates": lambda: ConstrainedL0(gate_lr=1.0),
    "gse": lambda: GSE(period=3),
}
BATCHES, EPOCHS = 8, 3
STEPS = BATCHES * EPOCHS
KEPT = round(0.25 * (16 * 32 + 32 * 4))
pytestmark = [
    pytest.mark.filterwarnings("ignore:The gates of .* reached an expected density"),
    pytest.mark.filterwarnings("ignore:.* output units? .* no connection"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Network(L.LightningModule):  # type: ignore[misc]
    """Draws each batch by the number of the step: Lightning does not resume within an epoch."""

    def __init__(self, grows: bool = False, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4)]
        if grows:
            layers[0], layers[3] = (SparseLinear(*s, density=0.25) for s in ((16, 32), (32, 4)))
        self.net = nn.Sequential(*layers)
        self.automatic_optimization = not manual

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(self.global_step))
        loss = nn.functional.cross_entropy(self.net(x), x[:, :4].argmax(1))
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("kept", float(self.net[0].weight.count_nonzero() if self.net else 0))
        self.log("score", float(-self.current_epoch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        if not self.automatic_optimization:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


def loader() -> Any:
    return torch.utils.data.DataLoader(torch.zeros(BATCHES, 1))


def fit(
    folder: Path,
    method: str = "spartan",
    *,
    ckpt: Path | None = None,
    epochs: int = EPOCHS,
    callbacks: tuple[Any, ...] = (),
    manual: bool = False,
    validated: bool = False,
    module: str | None = None,
    steps: int | None = None,
    kind: type[Network] = Network,
    **settings: Any,
) -> tuple[Network, Sparsify, Any]:
    network = kind(method == "gse", manual)
    pruning = Sparsify(METHODS[method](), Budget(density=0.25), module, total_steps=steps)
    quiet = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "log_every_n_steps": 4, "num_sanity_val_steps": 0,
    }  # fmt: skip
    trainer = L.Trainer(
        max_epochs=epochs, default_root_dir=folder, callbacks=[pruning, *callbacks],
        **{**quiet, **settings},
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        trainer.fit(network, loader(), loader() if validated else None, ckpt_path=ckpt)
    return network, pruning, trainer


def every(folder: Path, steps: int) -> Any:
    return those_of_lightning.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=steps, save_top_k=-1
    )


def kept(network: Network) -> int:
    return sum(
        int(weight.count_nonzero()) for weight in network.net.parameters() if weight.ndim == 2
    )


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_resumed_anywhere_is_the_same_run(
    method: str, manual: bool, tmp_path: Path
) -> None:
    whole, pruning, _ = fit(tmp_path, method, manual=manual, callbacks=(every(tmp_path, 5),))
    assert pruning.sparsifier is not None
    assert (pruning.sparsifier.step, pruning.sparsifier.finalized) == (STEPS, True)
    assert method == "gse" or kept(whole) == KEPT
    for step in (5, 10, 20):  # on the way, while masks move, and after they are fixed
        place = tmp_path / f"step={step}.ckpt"
        again, _, _ = fit(tmp_path, method, manual=manual, ckpt=place, enable_checkpointing=False)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), (step, name)


@pytest.mark.parametrize("method", ["spartan", "gates"])
@pytest.mark.parametrize(
    "averaging",
    [
        lambda: those_of_lightning.StochasticWeightAveraging(0.01, swa_epoch_start=1),
        lambda: those_of_lightning.EMAWeightAveraging(decay=0.5),
    ],
)
def test_averages_end_at_the_budget(method: str, averaging: Any, tmp_path: Path) -> None:
    callbacks = (averaging(), every(tmp_path, 20))
    network, pruning, _ = fit(tmp_path, method, callbacks=callbacks, validated=True)
    assert pruning.sparsifier is not None
    assert 0.8 * KEPT < kept(network) <= KEPT
    if method == "spartan":  # gates are at the budget only after the last selection
        saved = torch.load(tmp_path / "step=20.ckpt", weights_only=False)["state_dict"]
        assert saved.keys() == network.state_dict().keys()
        assert sum(int(w.count_nonzero()) for w in saved.values() if w.ndim == 2) <= KEPT


def test_the_best_model_is_one_at_the_budget(tmp_path: Path) -> None:
    best = those_of_lightning.ModelCheckpoint(tmp_path, monitor="score", mode="max", save_top_k=1)
    fit(tmp_path, callbacks=(best,), validated=True)
    # By the score the first epoch is the best, and the budget is reached in the second.
    weights = torch.load(best.best_model_path, weights_only=False)["state_dict"].values()
    assert sum(int(w.count_nonzero()) for w in weights if w.ndim == 2) == KEPT


def test_a_part_accumulation_clipping_half_precision(tmp_path: Path) -> None:
    network, pruning, _ = fit(
        tmp_path, module="net", accumulate_grad_batches=2, gradient_clip_val=0.5,
        precision="bf16-mixed", enable_checkpointing=False,
    )  # fmt: skip
    assert pruning.sparsifier is not None
    assert pruning.sparsifier.model is network.net
    assert (pruning.sparsifier.step, kept(network)) == (STEPS // 2, KEPT)


@pytest.mark.parametrize("module", [None, "net"])
def test_a_part_that_is_compiled(module: str | None, tmp_path: Path) -> None:
    class Compiled(Network):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]

    average = those_of_lightning.EMAWeightAveraging(decay=0.5)
    network, _, _ = fit(
        tmp_path, module=module, kind=Compiled, callbacks=(average, every(tmp_path, 20))
    )
    assert 0.8 * KEPT < kept(network) <= KEPT
    saved = torch.load(tmp_path / "step=20.ckpt", weights_only=False)["state_dict"]
    assert sum(int(w.count_nonzero()) for w in saved.values() if w.ndim == 2) <= KEPT


def test_numbers_come_by_self_log(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Log(L.loggers.logger.Logger):  # type: ignore[misc]
        name, version = "log", 0

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            seen.append(metrics)

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            pass

    fit(tmp_path, logger=Log(), enable_checkpointing=False)
    rows = [row for row in seen if "spartan/density" in row]
    assert len(rows) == STEPS // 4
    assert rows[-1]["spartan/kept"] == KEPT
    assert {"spartan/beta", "spartan/churn"} <= set(rows[0])


def test_more_epochs_than_planned_and_an_early_end(tmp_path: Path) -> None:
    fit(tmp_path, callbacks=(every(tmp_path, 10),))
    with pytest.warns(UserWarning, match="the rest of the schedule is planned for 40"):
        network, pruning, _ = fit(tmp_path, epochs=5, ckpt=tmp_path / "step=10.ckpt")
    assert pruning.sparsifier is not None
    assert (pruning.sparsifier.step, kept(network)) == (40, KEPT)
    with pytest.warns(UserWarning, match="before the schedule"):
        network, pruning, _ = fit(tmp_path, steps=200, enable_checkpointing=False)
    assert kept(network) == KEPT


def test_what_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(PrunableError, match="it has 'net'"):
        fit(tmp_path, module="backbone")
    with pytest.raises(ScheduleError, match="total_steps"):
        fit(tmp_path, epochs=-1)
    fit(tmp_path, callbacks=(every(tmp_path, 10),))
    with pytest.raises(StateError, match="method="):
        fit(tmp_path, "magnitude", ckpt=tmp_path / "step=10.ckpt")


def _process(rank: int, folder: Path, port: int) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    two = {"devices": 2, "strategy": "ddp"}
    whole, _, _ = fit(folder, callbacks=(every(folder, 3),), **two)
    place = folder / "step=6.ckpt"
    again, _, _ = fit(folder, ckpt=place, enable_checkpointing=False, **two)
    states = [{k: v.clone() for k, v in one.state_dict().items()} for one in (whole, again)]
    torch.save((*states, kept(whole)), folder / f"{rank}.pt")
    leave(dist)


def test_two_processes(tmp_path: Path, free_port: int) -> None:
    mp.spawn(_process, (tmp_path, free_port), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first[2] == second[2] == KEPT
    for other in (first[1], second[0], second[1]):
        assert all(torch.equal(value, other[name]) for name, value in first[0].items())
