"""What version 0.1 saved still loads: states of runs, run folders, packed files, pickled models."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import spartan
from spartan import NM, Block, Budget, Channel, Sparsifier, Unstructured
from spartan.always_sparse import SparseConv2d, SparseLinear
from spartan.commands.terminal.display import Phases
from spartan.deploy.inference_layers import InferenceLayer
from spartan.deploy.plan import Plan
from spartan.files import load_state
from spartan.methods import (
    DPF,
    DSTEE,
    FCPTS,
    GSE,
    SET,
    ConstrainedL0,
    DualAveraging,
    Fixed,
    Magnitude,
    PenalisedL0,
    Powerpropagation,
    PublishedFCPTS,
    RigL,
    Spartan,
    Static,
)
from tests.commands.calling import call
from tests.conftest import Net, train_step

OLD = Path(__file__).parent / "v0_1"
STOP, STEPS = 9, 20
CASES: dict[str, tuple[Any, Any, str]] = {
    "spartan": (Spartan(), Unstructured(), "global"),
    "spartan-block": (Spartan(), Block(2, 4), "global"),
    "spartan-nm": (Spartan(), NM(2, 4), "uniform"),
    "dual-averaging": (DualAveraging(backward_density=0.6), Unstructured(), "global"),
    "magnitude": (Magnitude(), Channel(inputs=True), "erk"),
    "dpf": (DPF(period=3), Unstructured(), "uniform"),
    "powerpropagation": (Powerpropagation(), Unstructured(), "global"),
    "fcpts": (FCPTS(), Unstructured(), "global"),
    "fcpts-published": (PublishedFCPTS(), Unstructured(), "global"),
    "constrained-l0": (ConstrainedL0(), Unstructured(), "global"),
    "penalised-l0": (PenalisedL0(), Channel(inputs=True), "global"),
    "gse": (GSE(period=2), None, "global"),
    "dst-ee": (DSTEE(period=2), None, "global"),
}


def test_every_method_of_version_0_1_with_a_state_of_its_own_is_here() -> None:
    here = {type(method) for method, _, _ in CASES.values()}
    # These keep what `magnitude` and `gse` keep, and nothing else.
    assert set(spartan.methods.METHODS.values()) - here == {Fixed, RigL, SET, Static}


@pytest.mark.parametrize("name", CASES)
def test_a_saved_run_goes_on_as_it_would_have(name: str) -> None:
    method, pattern, allocation = CASES[name]
    saved = load_state(OLD / "states" / f"{name}.safetensors")
    torch.manual_seed(7)  # another start than that of the run
    model: nn.Module = Net()
    if pattern is None:
        spartan.always_sparse.convert(model, 0.5, every_unit=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    budget = Budget(density=0.5, allocation=allocation)
    sparsifier = Sparsifier(model, optimizer, method, budget, STEPS, pattern=pattern)
    before = copy.deepcopy(saved["sparsifier"])
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    sparsifier.load_state_dict(saved["sparsifier"])
    assert sparsifier.step == STOP
    assert torch.equal(flat(saved["sparsifier"]), flat(before))  # what was loaded is not changed
    losses = [train_step(model, optimizer, step) for step in range(STOP, STEPS)]
    assert losses == pytest.approx(saved["losses"], rel=1e-3)
    assert sparsifier.state_dict()["version"] > before["version"]
    sparsifier.finalize()
    kept = {key: int(p.count_nonzero()) for key, p in model.named_parameters()}
    wanted = json.loads((OLD / "states" / "kept.json").read_text(encoding="utf-8"))[name]
    assert {key: kept[key] for key in wanted} == wanted


def flat(state: Any) -> torch.Tensor:
    """All numbers of a nested state, one after the other."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list):
        return torch.cat([torch.zeros(0), *map(flat, state)])
    if isinstance(state, torch.Tensor):
        return state.flatten().float()
    return torch.tensor([state] if isinstance(state, int | float) else []).float()


def loaded(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody wrote the old names by hand
        return torch.load(OLD / name, weights_only=False)


def test_pickled_models_compute_what_they_did() -> None:
    fast, example = loaded("accelerated.pt"), loaded("accelerated_output.pt")
    assert any(isinstance(module, InferenceLayer) for module in fast.modules())
    torch.testing.assert_close(fast(example["x"]), example["y"], rtol=1e-5, atol=1e-5)
    assert isinstance(loaded("plan.pt"), Plan)
    grown = loaded("always_sparse.pt")
    assert [type(grown[0]), type(grown[2])] == [SparseConv2d, SparseLinear]
    assert grown(torch.randn(2, 4, 4, 4)).shape == (2, 4)
    assert loaded("purged.pt")(torch.randn(2, 8)).shape == (2, 4)
    assert loaded("gated.pt")(torch.randn(2, 8)).shape == (2, 8)


def test_packed_files_hold_what_they_held() -> None:
    wanted = torch.load(OLD / "packed_state.pt")
    found = spartan.load(OLD / "packed.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    rounded = spartan.load(OLD / "packed16.safetensors")
    for name, tensor in wanted.items():
        rounds = tensor.dim() > 1
        assert torch.equal(rounded[name], tensor.bfloat16().float() if rounds else tensor)


# Run folders -------------------------------------------------------------------------------------


def folder(name: str, path: Path) -> Path:
    """A copy, as commands write into run folders."""
    return Path(shutil.copytree(OLD / name, path / name))


@pytest.mark.parametrize(
    ("name", "rest"), [("interrupted", "trained-rest"), ("growing", "growing-rest")]
)
def test_an_interrupted_training_goes_on_to_the_same_model(
    name: str, rest: str, tmp_path: Path
) -> None:
    run = folder(name, tmp_path)
    assert call("train", "--resume", run, "--trust") == 0
    found = load_file(run / "model.safetensors")
    for key, tensor in load_file(OLD / rest / "model.safetensors").items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["trained", "compressed"])
def test_finished_runs_are_evaluated_reported_and_inspected(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder(name, tmp_path)
    assert call("report", run) == 0
    assert (run / "report.html").exists()
    assert call("evaluate", run, "--trust") == 0
    assert "accuracy" in capsys.readouterr().out
    assert call("inspect", run / "model.safetensors") == 0
    tensors = load_file(run / "model.safetensors").values()
    assert str(sum(int(t.count_nonzero()) for t in tensors)) in capsys.readouterr().out


def test_a_world_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, steps = folder("world", tmp_path), []

    def interrupt(self: Phases, name: str, step: int, total: int) -> None:
        steps.append((name, step))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Phases, "tick", interrupt)
    assert call("world", "train", "--resume", run) == 128 + signal.SIGINT
    assert steps[0][0] == "dense"
    assert steps[0][1] > 1  # not from the beginning
