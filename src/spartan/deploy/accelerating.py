"""`accelerate`: runs layers on sparse inference kernels where they measure faster than dense."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from spartan.copies import copy_model
from spartan.deploy.choosing import choose
from spartan.deploy.comparison import (
    TOLERANCE,
    dense_copy,
    relative_error,
    require_layers,
    run_on_example,
)
from spartan.deploy.fast_path import FastPath, add_fast_path
from spartan.deploy.inference_layers import InferenceLayer
from spartan.deploy.plan import Plan
from spartan.deploy.running_state import changed_since, state_of
from spartan.deploy.timing import Timing, busy_warning, time_side_by_side
from spartan.errors import DeployError
from spartan.example_inputs import run_on
from spartan.kernels import backend


def accelerate(
    model: nn.Module, example_input: Any, *, seconds: float = 0.1, verbose: bool = True
) -> nn.Module:
    """Return a model for inference that runs sparse where that is faster.

    Each Linear and Conv2d is timed, dense and sparse, on the inputs it gets from `example_input`,
    with the current number of threads. The result is a copy of the model in evaluation mode, of the
    same class, with sparse layers where they won: they have what the dense layers had, a `weight`
    that is made when its values are read among it. A layer that cannot be replaced stays dense, and
    the plan says why. If torch.fx can trace the model, calls with the arguments of the example run
    batch norms, residual additions, ReLU and GELU within the sparse layers before them.

    The given model is not changed, and the result is in the state that it is in: all runs on the
    example are on copies. The result can be pickled and deep-copied, and its state dict saved and
    loaded. It takes whatever the model takes, but what is fastest was measured on this example. Its
    `plan` attribute says what was measured.

    Args:
        model: The model, with zeros where it was pruned.
        example_input: One input: a tensor, a tuple of positional or a dict of keyword arguments.
        seconds: How long to measure each layer.
        verbose: Print the plan.

    Raises:
        DeployError: The model cannot be copied, or does not run on the example.
    """
    require_layers(
        model, "replaced: accelerate the model that it was made from, and trace the result"
    )
    # Outside inference mode: the copy's tensors are to be ordinary ones.
    with torch.inference_mode(False), torch.no_grad():
        dense = dense_copy(model).eval().requires_grad_(False)
        trial = _Trial(dense, example_input)
        warnings = [w for w in (busy_warning(), trial.warning) if w]
        layers, chosen = choose(trial.fresh(), example_input, seconds)
        chosen, notes = trial.agreeing(chosen)
        work = _with_layers(trial.fresh(), chosen)
        work.plan = None  # type: ignore[assignment]
        unfused = _fuse(work, example_input, trial.changes) if chosen else "no layer runs sparse"
    layers = [
        layer.staying_dense(notes[layer.name]) if layer.name in notes else layer for layer in layers
    ]
    budget = 0.0 if trial.changes else max(5 * seconds, 0.2)
    dense_time, time = _times(dense, work if chosen else None, example_input, budget)
    if chosen and time.median > dense_time.median:
        chosen, time, unfused = {}, dense_time, "no layer runs sparse"
        layers = [layer.staying_dense("the whole model was slower") for layer in layers]
    work = work if chosen else dense
    if chosen and hasattr(work, "save_pretrained"):
        work.save_pretrained = _refuse_save_pretrained  # type: ignore[assignment]
    plan = Plan(
        layers=layers,
        dense=dense_time,
        accelerated=time,
        threads=torch.get_num_threads(),
        kernels=str(backend()),
        traced=not unfused,
        untraced=unfused,
        warnings=warnings,
    )
    work.plan = plan  # type: ignore[assignment]
    if verbose:
        print(plan)  # noqa: T201
    return work


def plan_of(accelerated: nn.Module) -> Plan:
    """Return the plan of a model that `accelerate` returned."""
    plan = accelerated.plan
    assert isinstance(plan, Plan)
    return plan


def _refuse_save_pretrained(*_: Any, **__: Any) -> None:
    raise DeployError(
        "The tensors of an accelerated model are no checkpoint of transformers: save the model "
        "that was given to accelerate."
    )


@dataclass(frozen=True)
class _Outcome:
    """What a model did with the example.

    Attributes:
        output: What it returned.
        changes: The name of something that the model changed of itself, or nothing.
    """

    output: Any
    changes: str


class _Trial:
    """Runs copies of a model on an example, each from the state that the model is in.

    Attributes:
        changes: What the model changes of itself when it runs, or nothing.
        warning: If its output is another at each run, that it was not compared.

    Args:
        dense: The model.
        example_input: One input.
    """

    def __init__(self, dense: nn.Module, example_input: Any) -> None:
        self._dense = dense
        self._example_input = example_input
        first = self._run(copy_model(dense, DeployError))
        self._reference = first.output
        self.changes = first.changes
        second = self._run(self.fresh())
        steady = relative_error(second.output, first.output) <= TOLERANCE
        self.warning = "" if steady else (
            "The model's output changes from run to run: its layers were compared, it was not."
        )  # fmt: skip

    def fresh(self) -> nn.Module:
        """Return a copy of the model that has not run; it shares parameters that nobody changes."""
        shared = () if self.changes else self._dense.parameters()
        return copy_model(self._dense, DeployError, shared=shared)

    def agreeing(
        self, layers: dict[str, InferenceLayer]
    ) -> tuple[dict[str, InferenceLayer], dict[str, str]]:
        """Return the layers with which the model computes the same, and of the others why not."""
        notes: dict[str, str] = {}

        def keep(kept: dict[str, InferenceLayer], names: list[str]) -> dict[str, InferenceLayer]:
            more = {name: layers[name] for name in names}
            reason = self._fault({**kept, **more}) if names else ""
            if not reason:
                return {**kept, **more}
            if len(names) == 1:
                notes[names[0]] = reason
                return kept
            half = len(names) // 2
            return keep(keep(kept, names[:half]), names[half:])

        return keep({}, list(layers)), notes

    def _fault(self, layers: dict[str, InferenceLayer]) -> str:
        """Return what is wrong with a model that has these layers, or nothing."""
        layers = copy.deepcopy(layers)  # the model may change them
        called: set[nn.Module] = set()
        for layer in layers.values():
            layer.register_forward_pre_hook(lambda module, _: called.add(module))
        try:
            output = self._run(_with_layers(self.fresh(), layers)).output
        except DeployError as failure:
            return f"the model fails with it: {failure.__cause__}".splitlines()[0]
        if any(layer.lent or layer.is_dense for layer in layers.values()):
            return "the model computes with its weight itself"
        if not called.issuperset(layers.values()):
            return "the model calls it where it is not registered, as from a list"
        error = 0.0 if self.warning else relative_error(output, self._reference)
        if not error <= TOLERANCE:
            return f"the model would differ by {error:.0e}"
        return ""

    def _run(self, model: nn.Module) -> _Outcome:
        before = state_of(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output = run_on_example(model, self._example_input)
        return _Outcome(output, changed_since(before, model))


def _with_layers(model: nn.Module, layers: dict[str, InferenceLayer]) -> nn.Module:
    """Return the model with layers in their places: everywhere that the module of that name is."""
    if "" in layers:
        return layers[""]
    by_module = {model.get_submodule(name): layer for name, layer in layers.items()}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in by_module:
                module._modules[name] = by_module[child]
    for module in model.modules():
        fast_path = isinstance(module, nn.TransformerEncoderLayer)
        if fast_path and any(isinstance(m, InferenceLayer) for m in module.children()):
            # The fast path reads the dense weights of its linear layers.
            module.activation_relu_or_gelu = 0  # type: ignore[assignment]
    return model


def _fuse(work: nn.Module, example_input: Any, changes: str) -> str:
    """Add a fast path, or return why there is none."""
    if isinstance(work, InferenceLayer):
        return "it is one layer"
    if changes:
        return f"it changes {changes!r} when it runs"
    try:
        add_fast_path(work, example_input)
    except DeployError as error:
        return str(error)
    return ""


def _times(
    dense: nn.Module, work: nn.Module | None, example_input: Any, seconds: float
) -> tuple[Timing, Timing]:
    """Return the times of copies of both models; twice the same if there is one."""
    example_input = copy.deepcopy(example_input)
    copies = [
        copy_model(m, DeployError, shared=m.parameters()) for m in (dense, work) if m is not None
    ]
    for one in copies:
        if isinstance(one.forward, FastPath):
            one.forward.build_for(example_input)
    calls = [partial(run_on, model, example_input) for model in copies]
    with torch.no_grad():  # not inference mode: some models differentiate in their forward
        times = time_side_by_side(calls, seconds)
    return times[0], times[-1]
