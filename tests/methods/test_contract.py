"""What every method must keep. A new method joins by adding one row to METHODS."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import spartan
from spartan import NM, Block, Budget, Channel, Sparsifier, Unstructured
from spartan.errors import BudgetError, PatternError
from spartan.methods import (
    DPF,
    FCPTS,
    ConstrainedL0,
    DualAveraging,
    Magnitude,
    MaskingMethod,
    PenalisedL0,
    Powerpropagation,
    Spartan,
)
from spartan.methods.masking.gated import Gated
from spartan.weights.patterns import Pattern
from tests.conftest import THOROUGH, Net, batch, train_step

METHODS: list[MaskingMethod] = [
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
ALLOCATIONS = ["global", "uniform", "erk"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
STEPS = 20
DENSITY = Fraction("0.3")
WEIGHTS = 288, 2048, 128  # of conv [8, 4, 3, 3], fc1 [16, 128] and fc2 [8, 16]: 2,464
UNITS: dict[Pattern, tuple[int, ...]] = {
    Unstructured(): WEIGHTS,
    Block(2, 4): (36, 256, 16),
    Channel(): (8, 16, 8),
    Channel(inputs=True): (4, 128, 16),
}
PATTERNS: list[Pattern] = [*UNITS, NM(2, 4)]
# Each pattern with each allocation, and both with each dtype; all triples in `make thorough`.
CASES = [
    (pattern, allocation, dtype)
    for i, pattern in enumerate(PATTERNS)
    for j, allocation in enumerate(ALLOCATIONS)
    for k, dtype in enumerate(DTYPES)
    if THOROUGH or k == (i + j) % 3
]

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
    method: MaskingMethod,
    pattern: Pattern | None = None,
    allocation: str = "global",
) -> Sparsifier:
    density = 0.5 if isinstance(pattern, NM) else float(DENSITY)
    budget = Budget(density=density, allocation=allocation)
    return Sparsifier(model, optimizer, method, budget, STEPS, pattern=pattern)


def reached(sparsifier: Sparsifier, step: int) -> bool:
    return sparsifier.progress_after(step) == 1.0


def erk_densities() -> list[float]:
    """Factor times sum(shape) / prod(shape), so that 2,464 weights keep DENSITY of them."""
    sums = 8 + 4 + 3 + 3, 16 + 128, 8 + 16
    factor = float(DENSITY) * 2464 / sum(sums)  # 3.97: no layer exceeds 1
    return [factor * s / n for s, n in zip(sums, WEIGHTS, strict=True)]


def held(weight: Tensor, pattern: Pattern) -> Tensor:
    """Return which units of a weight hold anything, cut here and not by the pattern."""
    there = weight.detach() != 0
    if isinstance(pattern, Block):
        rows, columns = there.shape[0] // pattern.rows, there.shape[1] // pattern.cols
        return there.view(rows, pattern.rows, columns, pattern.cols, -1).any(3).any(1).flatten()
    if isinstance(pattern, Channel):
        return there.transpose(0, int(pattern.inputs)).flatten(1).any(1)
    return there.flatten()


def check_budget(model: Net, pattern: Pattern, allocation: str) -> None:
    """Assert that the weights hold what the budget says, counted without the library."""
    weights = model.conv.weight, model.fc1.weight, model.fc2.weight
    assert not any(bool(torch.signbit(w[w == 0]).any()) for w in weights)
    if isinstance(pattern, NM):
        for w in weights:
            rows = (w != 0).movedim(1, -1).reshape(-1, pattern.m)
            assert bool((rows.sum(1) == pattern.n).all())
        return
    units = UNITS[pattern]
    kept = [int(held(w, pattern).sum()) for w in weights]
    sizes = [n // count for n, count in zip(WEIGHTS, units, strict=True)]
    # Weights of a kept unit are not zero by themselves in these models; but in bfloat16, with eight
    # bits, a step may end on zero.
    in_units = [k * s for k, s in zip(kept, sizes, strict=True)]
    zeros = [n - int(w.count_nonzero()) for n, w in zip(in_units, weights, strict=True)]
    most = 2 if weights[0].dtype == torch.bfloat16 else 0
    assert all(0 <= count <= most for count in zeros)
    wanted = {
        "uniform": [float(DENSITY * n) for n in units],
        "erk": [d * n for d, n in zip(erk_densities(), units, strict=True)],
    }.get(allocation)
    if wanted is None and isinstance(pattern, Channel):
        # Units of unequal cost: none more fits.
        assert float(DENSITY) * 2464 - max(sizes) < sum(in_units) <= float(DENSITY) * 2464
    elif wanted is None:
        assert sum(kept) == round(DENSITY * sum(units))
    elif allocation == "uniform" or isinstance(pattern, Channel):
        assert kept == [round(w) for w in wanted]
    else:
        assert sum(kept) == round(DENSITY * sum(units))
        assert all(abs(k - w) < 1 for k, w in zip(kept, wanted, strict=True))


@method_param
@pytest.mark.parametrize(("pattern", "allocation", "dtype"), CASES, ids=str)
def test_exact_at_every_step_after_warmup(
    method: MaskingMethod, pattern: Pattern, allocation: str, dtype: torch.dtype,
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
        if reached(sparsifier, step):
            check_budget(model, pattern, allocation)
        train_step(model, optimizer, step)
    sparsifier.finalize()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    check_budget(model, pattern, allocation)
    weights = model.conv.weight, model.fc1.weight, model.fc2.weight
    kept = sum(int(w.count_nonzero()) for w in weights)
    assert sparsifier.density == kept / 2464


def _sliced(weight: Tensor) -> Tensor:
    """Lay every second entry of a wider tensor open: there are gaps between the weights."""
    wide = weight.new_zeros(*weight.shape[:-1], 2 * weight.shape[-1])
    wide[..., ::2] = weight
    return wide[..., ::2]


# Ways in which weights lie in memory: other frameworks' checkpoints, slices, formats of images.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "inputs and outputs last": lambda w: (
        w.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1) if w.dim() == 4 else w
    ),
    "sliced": _sliced,
    "sliced and transposed": lambda w: _sliced(w.transpose(0, 1)).transpose(0, 1),
    "expanded, then cloned": lambda w: w + w[:1].mul(0.1).expand(w.shape).clone(),
    "channels last": lambda w: (
        w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@method_param
def test_exact_whatever_the_order_in_memory(
    method: MaskingMethod, pattern: Pattern, layout: str, make_net: Callable[..., Net]
) -> None:
    if isinstance(pattern, NM) and isinstance(method, Gated):
        return  # refused, as tested above
    if not THOROUGH and not isinstance(pattern, Unstructured) and method is not METHODS[0]:
        return
    model = make_net()
    for layer in (model.conv, model.fc1, model.fc2):
        layer.weight = nn.Parameter(LAYOUTS[layout](layer.weight.detach()))
    strides = [p.stride() for p in model.parameters()]
    optimizer = optimizer_for(model)
    sparsifier = sparsify(model, optimizer, method, pattern)
    for step in range(STEPS):
        if reached(sparsifier, step):
            check_budget(model, pattern, "global")
        train_step(model, optimizer, step)
    sparsifier.finalize()
    check_budget(model, pattern, "global")
    assert strides == [p.stride() for p in model.parameters()]


STOPS = (0, 2, 7, 12, 18)


@method_param
def test_resume_is_bit_equal(method: MaskingMethod, make_net: Callable[..., Net]) -> None:
    def start(seed: int) -> tuple[Net, torch.optim.Optimizer, Sparsifier]:
        model = make_net(seed)
        optimizer = optimizer_for(model)
        return model, optimizer, sparsify(model, optimizer, method)

    whole = start(0)
    losses = [train_step(whole[0], whole[1], step) for step in range(STEPS)]
    parts, again = start(0), []
    for step in range(STEPS):
        if step in STOPS:  # go on in another model, which had other weights
            saved = copy.deepcopy([part.state_dict() for part in parts])
            parts = start(90 + step)
            for part, state in zip(parts, saved, strict=True):
                part.load_state_dict(state)
            for name, tensor in parts[0].state_dict().items():
                assert torch.equal(tensor, saved[0][name])
        again.append(train_step(parts[0], parts[1], step))
    assert again == losses
    for _, _, sparsifier in (whole, parts):
        sparsifier.finalize()
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(tensor, parts[0].state_dict()[name])


@method_param
def test_identities_names_and_hooks(method: MaskingMethod, make_net: Callable[..., Net]) -> None:
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


@method_param
def test_deepcopy_and_average_of_the_model(
    method: MaskingMethod, make_net: Callable[..., Net]
) -> None:
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
def test_two_parameter_groups_change_nothing(
    method: MaskingMethod, make_net: Callable[..., Net]
) -> None:
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
    masking = {m for m in spartan.methods.METHODS.values() if issubclass(m, MaskingMethod)}
    # One holds what is there; the other has one pattern, one allocation, and rates that wander.
    assert tested == masking - {spartan.methods.Fixed, spartan.methods.PublishedFCPTS}
