"""Ways to train that people write: each ends exact, refused or told, and the table says which.

A loop is a function of a `Training`, which has a model and makes the sparsifier for it. After it
the model is counted without the library.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from spartan import Budget, Sparsifier
from spartan.always_sparse import SparseLinear
from spartan.methods import GSE, ConstrainedL0, Magnitude, Spartan

STEPS = 24
METHODS = {
    "spartan": lambda: Spartan(warmup=0.2),
    "magnitude": Magnitude,
    "gates": ConstrainedL0,
    "gse": lambda: GSE(period=3),
}
Loop = Callable[["Training"], None]


class Training:
    """A model, its data, and what a loop does to them."""

    def __init__(self, method: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.grows = method == "gse"
        self.make_method = METHODS[method]
        self.model = self.new_model()
        self.taken = 0  # training steps that the sparsifier must have counted

    def new_model(self) -> nn.Sequential:
        def layer(inputs: int, outputs: int) -> nn.Module:
            if self.grows:
                return SparseLinear(inputs, outputs, density=0.25)
            return nn.Linear(inputs, outputs)

        return nn.Sequential(layer(16, 24), nn.LayerNorm(24), nn.ReLU(), layer(24, 8))

    def attach(self, optimizer: Any, model: nn.Module | None = None) -> Sparsifier:
        # Each growing layer keeps its size, so that a checkpoint fits into another model.
        budget = Budget(density=0.25, allocation="uniform" if self.grows else "global")
        self.sparsifier = Sparsifier(
            model or self.model, optimizer, self.make_method(), budget, STEPS
        )
        return self.sparsifier

    def sgd(self, **settings: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, **settings)

    def batches(self, count: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(count):
            generator = torch.Generator().manual_seed(self.taken)
            self.taken += 1
            x = torch.randn(32, 16, generator=generator)
            yield x, x[:, :8].argmax(1)

    def backward(self, x: Tensor, y: Tensor, model: nn.Module | None = None) -> Tensor:
        self.model.zero_grad()
        loss = nn.functional.cross_entropy((model or self.model)(x), y)
        loss.backward()
        return loss

    def run(self, optimizer: Any, count: int = STEPS) -> None:
        for x, y in self.batches(count):
            self.backward(x, y)
            optimizer.step()

    def kept(self, model: nn.Module | None = None) -> int:
        layers = [m for m in (model or self.model).modules() if isinstance(m, nn.Linear)]
        sparse = [m for m in (model or self.model).modules() if isinstance(m, SparseLinear)]
        return sum(int(m.weight.count_nonzero()) for m in layers) + sum(
            m.values.numel() for m in sparse
        )


# Loops ---------------------------------------------------------------------------------------


def plain(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    t.run(optimizer)


def every_optimizer(t: Training) -> None:
    optimizer = torch.optim.AdamW(t.model.parameters(), lr=0.01)
    t.attach(None)
    t.run(optimizer)


def accumulation_and_clipping(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    for x, y in t.batches():
        t.model.zero_grad()
        for part in range(4):
            nn.functional.cross_entropy(t.model(x[part::4]), y[part::4]).backward()
        nn.utils.clip_grad_norm_(t.model.parameters(), 0.5)
        optimizer.step()


def clipping_by_value(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    for x, y in t.batches():
        t.backward(x, y)
        nn.utils.clip_grad_value_(t.model.parameters(), 0.01)
        optimizer.step()


def closures(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    for x, y in t.batches():
        optimizer.step(lambda x=x, y=y: t.backward(x, y))


def lbfgs(t: Training) -> None:
    optimizer = torch.optim.LBFGS(t.model.parameters(), lr=0.1, max_iter=3)
    t.attach(None)
    for x, y in t.batches():
        optimizer.step(lambda x=x, y=y: t.backward(x, y))


def grad_scaler(t: Training) -> None:
    optimizer, scaler = t.sgd(), torch.amp.GradScaler("cpu")
    t.attach(optimizer)
    for x, y in t.batches():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(t.model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def saving_in_a_hook_before_ours(t: Training) -> None:
    optimizer, seen = t.sgd(), []
    optimizer.register_step_post_hook(lambda *_: seen.append(t.model.state_dict()) and None)
    t.attach(optimizer)
    t.run(optimizer)
    assert len(seen) == STEPS


def looking_in_hooks_after_ours(t: Training) -> None:
    optimizer, seen = t.sgd(), []
    t.attach(None)

    def look(*_: Any) -> None:
        seen.append([p.detach().clone() for p in t.model.parameters() if p.dim() > 1])
        t.model.eval()(torch.zeros(2, 16))
        t.model.train()

    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(look)
    t.run(optimizer)
    if seen[-1]:  # dense weights: whoever looks sees w
        assert sum(int(w.count_nonzero()) for w in seen[-1]) == budget_of(t)


def model_run_inside_of_a_step(t: Training) -> None:
    shown = []

    class Probing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            with torch.no_grad():
                t.model(torch.zeros(2, 16))
            shown.append(sum(int((v != 0).sum()) for v in t.model.state_dict().values()))

    optimizer = Probing(t.model.parameters(), lr=0.1)
    t.attach(optimizer)
    t.run(optimizer)
    assert t.grows or shown[-1] < 24 * 16 / 2 + 24 * 8 / 2 + 100


def average_in_a_hook(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    average = AveragedModel(t.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(t.model))
    t.run(optimizer)
    t.sparsifier.project(average)
    assert t.kept(average) == budget_of(t)


def average_copied_into_the_model(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    average = AveragedModel(t.model)
    for x, y in t.batches():
        t.backward(x, y)
        optimizer.step()
        average.update_parameters(t.model)
    for p, q in zip(t.model.parameters(), average.module.parameters(), strict=True):
        p.data.copy_(q)
    t.sparsifier.finalize(keep="model")


def best_weights_loaded(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    t.run(optimizer, STEPS - 4)
    best = copy.deepcopy(t.model.state_dict())
    t.run(optimizer, 4)
    t.model.load_state_dict(best)
    t.sparsifier.finalize(keep="model")


def written_after_the_last_step(t: Training) -> None:
    plain(t)
    with torch.no_grad():
        for p in t.model.parameters():
            p.clamp_(-0.05, 0.05).add_(1e-6)


def clipped_through_data(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    for x, y in t.batches():
        t.backward(x, y)
        optimizer.step()
        for p in t.model.parameters():
            p.data.clamp_(-0.1, 0.1)
    t.sparsifier.finalize(keep="model")
    assert max(float(p.detach().abs().max()) for p in t.model.parameters()) <= 0.11


def float32_masters(t: Training) -> None:
    t.model.bfloat16()
    t.attach(None)
    masters = [p.detach().float().requires_grad_() for p in t.model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=0.01)
    for x, y in t.batches():
        t.backward(x.bfloat16(), y)
        for master, p in zip(masters, t.model.parameters(), strict=True):
            master.grad = p.grad.float()
        optimizer.step()
        for master, p in zip(masters, t.model.parameters(), strict=True):
            p.data.copy_(master)


def handle_of_a_trainer(t: Training) -> None:
    class Handle(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.__dict__.update(vars(optimizer))
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

    optimizer = Handle(t.sgd())
    t.attach(optimizer)
    t.run(optimizer)


class Lookahead(torch.optim.Optimizer):
    """Every fifth step goes half the way back to where it was five steps ago."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.count = base, 0
        super().__init__(base.param_groups, {})
        self.slow = {p: p.detach().clone() for g in base.param_groups for p in g["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.base.step(closure)
        self.count += 1
        if self.count % 5 == 0:
            for p, slow in self.slow.items():
                p.copy_(slow.lerp_(p, 0.5))
        return loss


def lookahead_given(t: Training) -> None:
    optimizer = Lookahead(t.sgd())
    t.attach(optimizer)
    t.run(optimizer)


def lookahead_around_the_given_one(t: Training) -> None:
    base = t.sgd()
    t.attach(base)
    t.run(Lookahead(base))


def lookahead_found(t: Training) -> None:
    optimizer = Lookahead(t.sgd())
    t.attach(None)
    t.run(optimizer)


def sam_in_two_calls(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    for x, y in t.batches():
        t.backward(x, y)
        before = [p.detach().clone() for p in t.model.parameters()]
        with torch.no_grad():
            for p in t.model.parameters():
                p.add_(p.grad, alpha=0.01)
        t.backward(x, y)
        for p, old in zip(t.model.parameters(), before, strict=True):
            p.data = old
        optimizer.step()


class ScheduleFree(torch.optim.Optimizer):
    """Plain steps at z, gradients at y, the average x of all z as the result."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] += 1
            for y in group["params"]:
                state = self.state[y]
                z, x = (state.setdefault(key, y.detach().clone()) for key in "zx")
                z.sub_(y.grad, alpha=group["lr"])
                x.lerp_(z, 1 / group["k"])
                y.copy_(z.lerp(x, 0.9))


def schedule_free(t: Training) -> None:
    optimizer = ScheduleFree(t.model.parameters(), lr=0.5)
    t.attach(optimizer)
    t.run(optimizer)


def optimizer_made_anew(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    t.run(optimizer, STEPS // 2)
    t.run(torch.optim.AdamW(t.model.parameters(), lr=0.01), STEPS // 2)


def unknown_optimizer_of_one_layer(t: Training) -> None:
    t.attach(t.sgd())
    t.run(torch.optim.SGD(t.model[3].parameters(), lr=0.1))


def halves(t: Training) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (t.model[:2], t.model[3:])]


def two_optimizers_given(t: Training) -> None:
    both = halves(t)
    t.attach(both)
    for x, y in t.batches():
        t.backward(x, y)
        for optimizer in both:
            optimizer.step()


def two_optimizers_found(t: Training) -> None:
    both = halves(t)
    t.attach(None)
    for x, y in t.batches():
        t.backward(x, y)
        for optimizer in reversed(both):
            optimizer.step()


def unequal_turns(t: Training) -> None:
    often, seldom = halves(t)
    t.attach(None)
    for x, y in t.batches():
        for optimizer in (often, often, seldom):
            t.backward(x, y)
            optimizer.step()


def optimizer_in_backward(t: Training) -> None:
    each = {p: torch.optim.SGD([p], lr=0.1) for p in t.model.parameters()}
    t.attach(None)

    def step_at_once(p: nn.Parameter) -> None:
        each[p].step()
        each[p].zero_grad()

    for p in t.model.parameters():
        p.register_post_accumulate_grad_hook(step_at_once)
    for x, y in t.batches():
        nn.functional.cross_entropy(t.model(x), y).backward()


def exchanged_head(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    t.model[3] = t.new_model()[3]
    optimizer.add_param_group({"params": list(t.model[3].parameters())})
    t.run(optimizer)


def assigned_state(t: Training) -> None:
    t.attach(None)
    state = {name: value.clone() for name, value in t.model.state_dict().items()}
    t.model.load_state_dict(state, assign=True)
    t.run(t.sgd())


def surplus_steps(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    t.run(optimizer, STEPS + 3)


def finalized_twice(t: Training) -> None:
    plain(t)
    t.sparsifier.finalize()


def trained_after_the_end(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    t.run(optimizer)
    t.sparsifier.finalize()
    if not t.grows:  # connections stay where they are, also then
        t.run(optimizer, 1)


def states_filled_by_hidden_steps(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    get_optimizer_state_dict(t.model, optimizer)
    t.run(optimizer)
    get_optimizer_state_dict(t.model, optimizer)


def resumed(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    t.run(optimizer, STEPS // 2)
    file = io.BytesIO()
    torch.save([o.state_dict() for o in (t.model, optimizer, t.sparsifier)], file)
    t.model = t.new_model()
    optimizer = t.sgd()
    t.attach(optimizer)
    file.seek(0)
    for one, state in zip((t.model, optimizer, t.sparsifier), torch.load(file), strict=True):
        one.load_state_dict(state)
    t.run(optimizer, STEPS // 2)


def resumed_from_a_distributed_checkpoint(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    t.run(optimizer, STEPS // 2)
    states = {"model": t.model.state_dict(), "sparsifier": t.sparsifier.state_dict()}
    dcp.save(states, checkpoint_id=t.folder)
    t.model = t.new_model()
    optimizer = t.sgd()
    t.attach(optimizer)
    states = {"model": t.model.state_dict(), "sparsifier": t.sparsifier.state_dict()}
    dcp.load(states, checkpoint_id=t.folder)
    t.model.load_state_dict(states["model"])
    t.sparsifier.load_state_dict(states["sparsifier"])
    t.run(optimizer, STEPS // 2)


def compiled(t: Training) -> None:
    optimizer = t.sgd()
    model = torch.compile(t.model, backend="eager")
    t.attach(optimizer, model)
    assert not any("_orig_mod" in weight.name for weight in t.sparsifier.weights)
    for x, y in t.batches():
        t.backward(x, y, model)
        optimizer.step()


def copies_along_the_way(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    best = None
    for x, y in t.batches():
        t.backward(x, y)
        optimizer.step()
        best = copy.deepcopy(t.model)
    assert best is not None
    assert t.kept(best) == budget_of(t)


def another_gradient_before(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    for x, y in t.batches():
        z = (10 * x).requires_grad_()
        torch.autograd.grad(t.model(z).square().sum(), z)
        t.backward(x, y)
        optimizer.step()


def gradients_set_by_hand(t: Training) -> None:
    optimizer = t.sgd()
    t.attach(optimizer)
    for x, y in t.batches():
        losses = [nn.functional.cross_entropy(t.model(x[i::2]), y[i::2]) for i in range(2)]
        parts = [torch.autograd.grad(loss, [*t.model.parameters()]) for loss in losses]
        for p, first, second in zip(t.model.parameters(), *parts, strict=True):
            p.grad = first + second
        optimizer.step()


def everything_of_it_in_bfloat16(t: Training) -> None:
    t.model.bfloat16()
    optimizer = t.sgd()
    t.attach(optimizer)
    for x, y in t.batches():
        t.backward(x.bfloat16(), y)
        optimizer.step()


def budget_of(t: Training) -> int:
    return round(0.25 * (16 * 24 + 24 * 8))
