"""The optimizer's state dict carries the run: saved and loaded by loops that know nothing of it."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.optim import ZeroRedundancyOptimizer

from spartan import Budget, Sparsifier
from spartan.always_sparse import SparseLinear
from spartan.errors import StateError
from spartan.methods import GSE, ConstrainedL0, Magnitude, Spartan
from tests.conftest import leave

# Gates have not come to their density after so few steps, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:The gates of .* reached an expected density")
STEPS = 20
STOPS = (3, 9, 18)  # on the way to the budget, while masks move, and after they are fixed
METHODS: dict[str, Callable[[], Any]] = {
    "spartan": Spartan,
    "magnitude": Magnitude,
    "gates": ConstrainedL0,
    "gse": lambda: GSE(period=3),
}


class Run:
    """A model, an optimizer and, in time, a sparsifier."""

    def __init__(self, method: str = "spartan", seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.method = method
        layers = [nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 4)]
        if method == "gse":
            layers[0], layers[3] = (SparseLinear(*s, density=0.25) for s in ((16, 32), (32, 4)))
        self.model = nn.Sequential(*layers)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)

    def attach(self, **settings: Any) -> Run:
        allocation = "uniform" if self.method == "gse" else "global"
        budget = Budget(density=0.25, allocation=allocation)
        self.sparsifier = Sparsifier(
            self.model, self.optimizer, METHODS[self.method](), budget, STEPS, **settings
        )
        return self

    def train(self, steps: Iterable[int]) -> Run:
        for step in steps:
            x, y = example(step)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
        return self

    def saved(self) -> dict[str, Any]:
        """Go through a file, as trainers load it."""
        file = io.BytesIO()
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(states, file)
        file.seek(0)
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
        return loaded

    def finished(self) -> dict[str, Tensor]:
        self.sparsifier.finalize()
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def example(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
    return x, x[:, :4].argmax(1)


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def model_first(states: dict[str, Any], run: Run) -> None:
    run.attach()
    run.model.load_state_dict(states["model"])
    run.optimizer.load_state_dict(states["optimizer"])


def optimizer_first(states: dict[str, Any], run: Run) -> None:
    run.attach()
    run.optimizer.load_state_dict(states["optimizer"])
    run.model.load_state_dict(states["model"])


def before_the_sparsifier(states: dict[str, Any], run: Run) -> None:
    run.model.load_state_dict(states["model"])
    run.optimizer.load_state_dict(states["optimizer"])
    run.attach()
    assert "spartan" not in run.optimizer.param_groups[0]


def past_the_hooks(states: dict[str, Any], run: Run) -> None:
    """Some optimizers have a `load_state_dict` of their own."""
    run.attach()
    run.model.load_state_dict(states["model"])
    other = torch.optim.AdamW(run.model.parameters())
    other.load_state_dict(states["optimizer"])
    run.optimizer.__setstate__({"state": other.state, "param_groups": other.param_groups})


@pytest.mark.parametrize(
    "resume", [model_first, optimizer_first, before_the_sparsifier, past_the_hooks]
)
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("method", METHODS)
def test_who_saves_model_and_optimizer_has_saved_the_run(
    method: str, stop: int, resume: Callable[[dict[str, Any], Run], None]
) -> None:
    whole = Run(method).attach().train(range(STEPS))
    states = Run(method).attach().train(range(stop)).saved()
    again = Run(method, seed=1)
    resume(states, again)
    again.train(range(stop, STEPS))
    assert again.sparsifier.step == STEPS
    assert_equal(again.finished(), whole.finished())


@pytest.mark.parametrize("method", METHODS)
def test_distributed_checkpoints_carry_it(method: str, tmp_path: Any) -> None:
    whole = Run(method).attach().train(range(STEPS))
    half = Run(method).attach().train(range(9))
    again = Run(method, seed=1).attach().train([0])  # what is loaded into has a state of its own
    saved = dict(zip("mo", get_state_dict(half.model, half.optimizer), strict=True))
    dcp.save(saved, checkpoint_id=tmp_path)
    states = dict(zip("mo", get_state_dict(again.model, again.optimizer), strict=True))
    dcp.load(states, checkpoint_id=tmp_path)
    set_state_dict(
        again.model, again.optimizer, model_state_dict=states["m"], optim_state_dict=states["o"]
    )
    assert_equal(again.train(range(9, STEPS)).finished(), whole.finished())


def test_optimizers_that_are_found_carry_it_too() -> None:
    runs = [Run(), Run(), Run(seed=1)]
    for run in runs:
        run.sparsifier = Sparsifier(run.model, None, Spartan(), 0.25, STEPS)
    states = runs[1].train(range(9)).saved()
    runs[2].model.load_state_dict(states["model"])
    runs[2].optimizer.load_state_dict(states["optimizer"])
    finals = [runs[0].train(range(STEPS)).finished(), runs[2].train(range(9, STEPS)).finished()]
    assert_equal(*finals)


def test_an_optimizer_that_takes_the_place_of_another_carries_it() -> None:
    run = Run().attach().train(range(5))
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="takes its place"):
        run.train([5])
    again = Run(seed=1)
    again.optimizer = torch.optim.SGD(again.model.parameters(), lr=0.01)
    model_first(run.saved(), again)
    assert again.sparsifier.step == 6


def test_of_several_optimizers_the_first_carries_it() -> None:
    def halves(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[0], model[3])]

    first, second = (nn.Sequential(*Run().model) for _ in range(2))
    optimizers, others = halves(first), halves(second)
    sparsifiers = [
        Sparsifier(m, o, Magnitude(), 0.25, STEPS)
        for m, o in ((first, optimizers), (second, others))
    ]
    for step in range(8):
        x, y = example(step)
        nn.functional.cross_entropy(first(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert "spartan" not in optimizers[1].state_dict()["param_groups"][0]
    second.load_state_dict(first.state_dict())
    for mine, other in zip(optimizers, others, strict=True):
        other.load_state_dict(mine.state_dict())
    assert sparsifiers[1].step == 8
    assert_equal(sparsifiers[0].selected(), sparsifiers[1].selected())


def test_two_sparsifiers_share_an_optimizer() -> None:
    def attached(seed: int) -> tuple[Run, list[Sparsifier]]:
        run = Run(seed=seed)
        parts = [
            Sparsifier(run.model, run.optimizer, method, density, STEPS, include=[name])
            for method, density, name in ((Spartan(), 0.5, "0"), (Magnitude(), 0.25, "3"))
        ]
        return run, parts

    run, parts = attached(0)
    states = run.train(range(9)).saved()
    again, found = attached(1)
    again.model.load_state_dict(states["model"])
    again.optimizer.load_state_dict(states["optimizer"])
    for mine, other in zip(parts, found, strict=True):
        assert other.step == 9
        assert_equal(mine.selected(), other.selected())
    assert "spartan" not in again.train([9]).optimizer.param_groups[0]


class Delegating(torch.optim.Optimizer):
    """A wrapper whose states are those of the optimizer that it wraps."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self.param_groups = self.inner.param_groups


def test_wrappers_that_save_what_they_wrap() -> None:
    runs = [Run(), Run(), Run(seed=1)]
    for run in runs:
        run.optimizer = Delegating(run.optimizer)
    whole = runs[0].attach().train(range(STEPS))
    model_first(runs[1].attach().train(range(9)).saved(), runs[2])
    assert_equal(runs[2].train(range(9, STEPS)).finished(), whole.finished())


def test_a_state_that_carries_nothing_is_told_where_it_would_begin_anew() -> None:
    dense = Run().train(range(3)).saved()
    run = Run().attach()
    run.optimizer.load_state_dict(dense["optimizer"])
    with pytest.warns(UserWarning, match="carries no sparsifier's"):
        run.train([3])
    # States of before there were any: three files, the third of which is the sparsifier's.
    old = Run().attach(checkpoint_with=None).train(range(5))
    again, states = Run(seed=1).attach(), old.saved()
    again.model.load_state_dict(states["model"])
    again.optimizer.load_state_dict(states["optimizer"])
    again.sparsifier.load_state_dict(old.sparsifier.state_dict())
    again.train(range(5, STEPS))
    assert_equal(again.finished(), old.train(range(5, STEPS)).finished())


def test_a_state_that_does_not_fit_is_refused_before_the_optimizer_is_changed() -> None:
    states = Run().attach().train(range(5)).saved()
    run = Run(seed=1)
    sparsifier = Sparsifier(run.model, run.optimizer, Magnitude(), 0.25, STEPS)
    before = [parameter.clone() for parameter in run.model.parameters()]
    with pytest.raises(StateError, match="method="):
        run.optimizer.load_state_dict(states["optimizer"])
    assert all(map(torch.equal, before, run.model.parameters()))
    assert not run.optimizer.state
    run.train([0])
    assert sparsifier.step == 1


def test_an_optimizer_that_brings_a_state_takes_no_other_sparsifier() -> None:
    states = Run().attach().train(range(5)).saved()
    run = Run(seed=1)
    run.model.load_state_dict(states["model"])
    run.optimizer.load_state_dict(states["optimizer"])
    before = [parameter.clone() for parameter in run.model.parameters()]
    with pytest.raises(StateError, match="method="):
        Sparsifier(run.model, run.optimizer, Magnitude(begin=0, end=0), 0.25, STEPS)
    assert all(map(torch.equal, before, run.model.parameters()))
    assert run.attach().sparsifier.step == 5


def test_nothing_rides_where_nobody_wants_it_or_the_run_is_over() -> None:
    run = Run().attach(checkpoint_with=None).train([0])
    assert "spartan" not in run.optimizer.state_dict()["param_groups"][0]
    with pytest.warns(UserWarning, match="ends here"):
        run.attach()
    assert "spartan" in run.optimizer.state_dict()["param_groups"][0]
    with pytest.warns(UserWarning, match="before the schedule"):
        run.finished()
    assert "spartan" not in run.optimizer.state_dict()["param_groups"][0]
    with pytest.raises(StateError, match="checkpoint_with='model'"):
        Run().attach(checkpoint_with="model")


def test_networks_alike_that_share_an_optimizer() -> None:
    def twins(seed: int) -> tuple[Run, nn.Module, list[Sparsifier]]:
        run = Run(seed=seed)
        other = Run(seed=seed + 10).model
        run.optimizer = torch.optim.Adam([*run.model.parameters(), *other.parameters()], lr=0.01)
        made = [
            Sparsifier(model, run.optimizer, Spartan(), 0.25, STEPS) for model in (run.model, other)
        ]
        return run, other, made

    run, other, made = twins(0)
    for step in range(9):
        x, y = example(step)
        run.optimizer.zero_grad()
        nn.functional.cross_entropy(run.model(x) + other(x), y).backward()
        run.optimizer.step()
    states = {**run.saved(), "other": copy.deepcopy(other.state_dict())}
    again, twin, found = twins(1)
    again.model.load_state_dict(states["model"])
    twin.load_state_dict(states["other"])
    again.optimizer.load_state_dict(states["optimizer"])
    assert_equal(again.model.state_dict(), states["model"])
    assert_equal(twin.state_dict(), states["other"])
    for mine, theirs in zip(made, found, strict=True):
        assert theirs.step == 9
        assert_equal(mine.selected(), theirs.selected())


@pytest.mark.parametrize("method", METHODS)
def test_a_new_sparsifier_in_the_same_process_goes_on_from_what_was_loaded(method: str) -> None:
    whole = Run(method).attach().train(range(STEPS))
    run = Run(method).attach().train(range(9))
    states = run.saved()
    run.train(range(9, 12))  # then something goes wrong, and it is tried again
    run.model.load_state_dict(states["model"])
    run.optimizer.load_state_dict(states["optimizer"])
    with pytest.warns(UserWarning, match="that one ends here"):
        run.attach()
    assert run.sparsifier.step == 9
    assert_equal(run.train(range(9, STEPS)).finished(), whole.finished())


def test_after_a_refusal_the_right_settings_go_on_and_save() -> None:
    states = Run().attach().train(range(9)).saved()
    run = Run(seed=1)
    run.model.load_state_dict(states["model"])
    run.optimizer.load_state_dict(states["optimizer"])
    with pytest.raises(StateError, match=r"total_steps.*checkpoint_with=None"):
        Sparsifier(run.model, run.optimizer, Spartan(), 0.25, 2 * STEPS)
    run.attach().train(range(9, 12))
    model_first(run.saved(), Run(seed=2))
    # Or another run begins, and what was loaded is forgotten.
    run = Run(seed=1)
    run.optimizer.load_state_dict(states["optimizer"])
    other = Sparsifier(run.model, run.optimizer, Magnitude(), 0.5, STEPS, checkpoint_with=None)
    assert other.step == 0
    assert "spartan" not in run.optimizer.state_dict()["param_groups"][0]


def test_optimizers_in_another_order_bring_it_too() -> None:
    def halves(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[0], model[3])]

    first, second = Run().model, Run(seed=1).model
    one, other = halves(first)
    Sparsifier(first, [one, other], Magnitude(), 0.25, STEPS)
    for step in range(8):
        x, y = example(step)
        nn.functional.cross_entropy(first(x), y).backward()
        for optimizer in (one, other):
            optimizer.step()
            optimizer.zero_grad()
    second.load_state_dict(first.state_dict())
    mine = halves(second)
    for optimizer, saved in zip(mine, (one, other), strict=True):
        optimizer.load_state_dict(saved.state_dict())
    assert Sparsifier(second, mine[::-1], Magnitude(), 0.25, STEPS).step == 8


def test_saving_changes_nothing() -> None:
    runs = [Run().attach().train(range(6)) for _ in range(2)]
    for run, saves in zip(runs, (True, False), strict=True):
        weights = copy.deepcopy(run.model.state_dict())
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.mul_(0.5)  # an average, say, that is swapped in to be evaluated
        if saves:
            run.optimizer.state_dict()
        run.model.load_state_dict(weights)
        run.train(range(6, STEPS))
    assert_equal(*(run.finished() for run in runs))


def test_connections_may_be_loaded_after_the_optimizer_also_into_the_same_graph() -> None:
    whole = Run("gse").attach().train(range(STEPS))
    states = Run("gse").attach().train(range(9)).saved()
    again = Run("gse")  # of the same seed: its first connections belong to the state as well
    optimizer_first(states, again)
    assert_equal(again.train(range(9, STEPS)).finished(), whole.finished())


def test_going_back_to_an_earlier_state_goes_back_with_the_run() -> None:
    run = Run().attach().train(range(6))
    states, selected = run.saved(), run.sparsifier.selected()
    run.train(range(6, 12))
    run.model.load_state_dict(states["model"])
    run.optimizer.load_state_dict(states["optimizer"])
    assert run.sparsifier.step == 6
    assert_equal(run.sparsifier.selected(), selected)


def _sharded(rank: int, folder: Path, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)

    def fresh(seed: int) -> Run:
        run = Run(seed=seed)
        run.optimizer = ZeroRedundancyOptimizer(
            run.model.parameters(), optimizer_class=torch.optim.AdamW, lr=0.01
        )
        return run.attach()

    whole = fresh(0).train(range(STEPS)).finished()
    half = fresh(0).train(range(9))
    half.optimizer.consolidate_state_dict(0)  # type: ignore[attr-defined]
    if rank == 0:
        torch.save(half.saved(), folder / "saved.pt")
    dist.barrier()
    states, again = torch.load(folder / "saved.pt"), fresh(1)
    again.model.load_state_dict(states["model"])
    again.optimizer.load_state_dict(states["optimizer"])
    again.train(range(9, STEPS))
    assert "spartan" not in again.optimizer.param_groups[0]
    assert_equal(again.finished(), whole)
    leave(dist)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_a_sharded_optimizer_carries_it(tmp_path: Path, free_port: int) -> None:
    mp.spawn(_sharded, (tmp_path, free_port), nprocs=2)  # type: ignore[no-untyped-call]
