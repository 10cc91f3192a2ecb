"""What every method must keep. A new method joins by adding one row to METHODS."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

import spartan
from spartan import NM, Block, Budget, Channel, Sparsifier, Unstructured
from spartan.errors import BudgetError, PatternError
from spartan.methods import (
    DPF,
    FCPTS,
    ConstrainedL0,
    DualAveraging,
    Magnitude,
    Method,
    PenalisedL0,
    Powerpropagation,
    Spartan,
)
from spartan.methods.masking.gated import Gated
from spartan.weights.patterns import Pattern
from tests.conftest import Net, batch, train_step

METHODS: list[Method] = [
    Spartan(),
    Spartan(warmup=0.0, annealing="cosine"),
    Spartan(beta_scale="absolute"),
    DualAveraging(),
    DualAveraging(backward_density=0.6, warmup=0.0),
    Magnitude(),
    Magnitude(schedule="one-shot", begin=0.25),
    DPF(period=3),
    Powerpropagation(alpha=1.5),
    Powerpropagation(alpha=3.0, schedule="one-shot"),
    FCPTS(),
    FCPTS(ramp=0.0, finetune=0.0, rate_step=0.5),
    ConstrainedL0(),
    ConstrainedL0(dual="restart", warmup=0.0, finetune=0.0),
    PenalisedL0(),
]
PATTERNS: list[Pattern] = [Unstructured(), Block(2, 4), NM(2, 4), Channel(), Channel(inputs=True)]
ALLOCATIONS = ["global", "uniform", "erk"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
STEPS = 20

# Random weights of unequal scale: whole layers may lose all their channels.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Nothing is kept"),
    pytest.mark.filterwarnings("ignore:All gates of"),
    pytest.mark.filterwarnings("ignore:The loss does not change"),
    pytest.mark.filterwarnings("ignore:The gates of"),  # these runs are too short
]

method_param = pytest.mark.parametrize("method", METHODS, ids=repr)


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    """Two parameter groups, momentum and weight decay."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 1e-2}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def sparsify(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method,
    pattern: Pattern | None = None,
    allocation: str = "global",
) -> Sparsifier:
    budget = Budget(density=0.5, allocation=allocation)
    return Sparsifier(model, optimizer, method, budget, STEPS, pattern=pattern)


def reached(method: Method, step: int) -> bool:
    return method.progress(step, STEPS) == 1.0


def check_budget(sparsifier: Sparsifier, pattern: Pattern) -> None:
    for group in sparsifier.groups:
        share = group.share
        if share.rows:
            for site in group.sites:
                assert bool((site.mask.sum(dim=1) == share.kept).all())
        elif share.counted:
            assert sum(site.kept for site in group.sites) == share.kept
        else:
            cheapest = max(site.cost for site in group.sites)
            assert share.kept - cheapest < group.kept <= share.kept + 1e-9
        for site in group.sites:
            zeros = int((site.weight.parameter == 0).sum())
            kept = site.kept * pattern.unit_numel(site.weight)
            # Weights of a kept unit are not zero by themselves in these models.
            assert site.weight.parameter.numel() - zeros == kept
            assert not bool(torch.signbit(site.weight.parameter[site.weight.parameter == 0]).any())


@method_param
@pytest.mark.parametrize(
    ("pattern", "allocation", "dtype"),
    list(itertools.product(PATTERNS, ALLOCATIONS, DTYPES)),
    ids=str,
)
def test_exact_at_every_step_after_warmup(
    method: Method, pattern: Pattern, allocation: str, dtype: torch.dtype,
    make_net: Callable[..., Net],
) -> None:  # fmt: skip
    model = make_net(dtype=dtype)
    optimizer = optimizer_for(model)
    if isinstance(pattern, NM) and allocation == "erk":
        with pytest.raises(BudgetError, match="keeps exactly 2 of every 4"):
            sparsify(model, optimizer, method, pattern, allocation)
        return
    if isinstance(pattern, NM) and isinstance(method, Gated):
        with pytest.raises(PatternError, match="Use 'spartan' or 'dpf' for N:M"):
            sparsify(model, optimizer, method, pattern, allocation)
        return
    sparsifier = sparsify(model, optimizer, method, pattern, allocation)
    for step in range(STEPS):
        if reached(method, step):
            check_budget(sparsifier, pattern)
        train_step(model, optimizer, step)
    sparsifier.finalize()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    for site in sparsifier.sites:
        kept = site.kept * pattern.unit_numel(site.weight)
        assert int(torch.count_nonzero(site.weight.parameter)) == kept


@method_param
@pytest.mark.parametrize("stop", [0, 2, 7, 12, 18])
def test_resume_is_bit_equal(method: Method, stop: int, make_net: Callable[..., Net]) -> None:
    model = make_net()
    optimizer = optimizer_for(model)
    sparsifier = sparsify(model, optimizer, method)
    losses = []
    for step in range(STEPS):
        if step == stop:
            saved = copy.deepcopy(
                (model.state_dict(), optimizer.state_dict(), sparsifier.state_dict())
            )
        losses.append(train_step(model, optimizer, step))
    sparsifier.finalize()

    other = make_net(seed=99)
    other_optimizer = optimizer_for(other)
    resumed = sparsify(other, other_optimizer, method)
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, saved[0][name])
    again = [train_step(other, other_optimizer, step) for step in range(stop, STEPS)]
    resumed.finalize()
    assert again == losses[stop:]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


@method_param
def test_identities_names_and_hooks(method: Method, make_net: Callable[..., Net]) -> None:
    model = make_net()
    optimizer = optimizer_for(model)
    before = dict(model.named_parameters())
    modules = [type(m) for m in model.modules()]
    sparsifier = sparsify(model, optimizer, method)
    assert optimizer._optimizer_step_pre_hooks
    for step in range(STEPS):
        train_step(model, optimizer, step)
    assert list(model.state_dict()) == list(Net().state_dict())
    sparsifier.finalize()
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert [type(m) for m in model.modules()] == modules
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert sparsifier.density == sum(s.kept for s in sparsifier.sites) / sum(
        s.weight.parameter.numel() for s in sparsifier.sites
    )


@method_param
def test_deepcopy_and_average_of_the_model(method: Method, make_net: Callable[..., Net]) -> None:
    model = make_net()
    optimizer = optimizer_for(model)
    sparsifier = sparsify(model, optimizer, method)
    average = torch.optim.swa_utils.AveragedModel(model)
    for step in range(STEPS - 1):
        train_step(model, optimizer, step)
        average.update_parameters(model)
    twin = copy.deepcopy(model)
    x, _ = batch(0)
    assert torch.equal(twin.eval()(x), model.eval()(x))
    frozen = copy.deepcopy(twin.state_dict())
    train_step(model.train(), optimizer, STEPS - 1)
    assert all(torch.equal(frozen[k], v) for k, v in twin.state_dict().items())
    sparsifier.finalize()


@method_param
def test_two_parameter_groups_change_nothing(method: Method, make_net: Callable[..., Net]) -> None:
    finals = []
    for split in (False, True):
        model = make_net()
        params = list(model.parameters())
        groups = [{"params": params[:3]}, {"params": params[3:]}] if split else params
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        sparsifier = sparsify(model, optimizer, method)
        for step in range(STEPS):
            train_step(model, optimizer, step)
        sparsifier.finalize()
        finals.append(model.state_dict())
    assert all(torch.equal(finals[0][k], finals[1][k]) for k in finals[0])


def test_every_method_has_a_row() -> None:
    tested = {type(m) for m in METHODS}
    masking = {m for m in spartan.methods.METHODS.values() if issubclass(m, Method)}
    # One holds what is there; the other has one pattern, one allocation, and rates that wander.
    assert tested == masking - {spartan.methods.Fixed, spartan.methods.PublishedFCPTS}
