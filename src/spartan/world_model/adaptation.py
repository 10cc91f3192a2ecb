r"""Adapts to an unknown intervention: fits its token to a few trajectories.

    T_adapt = argmin_T  E MSE(f(x, T), x')          all weights of f as they are

The loss in T has plateaus where no gate to the token is open: opening one of them has no effect
either, as nobody attends to the token. Descent therefore begins with a token that everybody attends
to a little, and whose gates are open half of the time, and ends with the model as it is. It starts
from each entry of the codebook, from their mean, and from the sum of those that suit some object
best, side by side, and the best is taken.

Source: Lei, Schölkopf, Posner, arXiv 2411.06890, section 4; how it is fitted is our own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spartan.errors import WorldError
from spartan.seeds import derive_seed
from spartan.world_model.model import Prediction, TransitionModel
from spartan.world_model.toggling import gate_slopes, squared_errors
from spartan.world_model.transitions import Transitions

# What logits of the token are divided by at first, and in what part of the steps that falls to 1:
# for the rest, reads are as sharp as in use.
_SOFTNESS, _SOFT = 1000.0, 0.8


@dataclass(frozen=True)
class Adaptation:
    """What adapting found.

    Attributes:
        token: T_adapt, `[d]`; give it as `environment` to the model.
        error: On the trajectories, in units of σ.
        start: Entry of the codebook it began from; -1 for the mean of all, K for the sum of those
            that suit some object best.
        start_error: Of that token before adapting.
    """

    token: Tensor
    error: float
    start: int
    start_error: float


@torch.enable_grad()
def adapt(
    model: TransitionModel,
    trajectories: Transitions,
    steps: int = 600,
    lr: float = 0.1,
    seed: int = 0,
) -> Adaptation:
    """Fit an intervention's token to trajectories of an unknown environment.

    The model is left as it is: no weight, no gradient and no mode changes.

    Args:
        model: A trained model.
        trajectories: Transitions of the environment; what they say of it is not read.
        steps: Of Adam, for each start.
        lr: Adam's rate, falling to 0 in the second half.
        seed: Decides the gates.

    Raises:
        WorldError: Data and model do not fit, or a setting is out of range.
    """
    if steps < 1 or not lr > 0:
        raise WorldError(f"steps={steps} and lr={lr} given; both must be positive.")
    if trajectories.following.shape[-1] != model.config.changing:
        raise WorldError(
            f"The trajectories have {trajectories.following.shape[-1]} features that change, the "
            f"model {model.config.changing}."
        )
    codebook = model.codebook.detach()
    mean, composed = codebook.mean(0), compose(model, trajectories)
    starts = torch.stack((mean, *codebook, composed))
    tokens = starts.clone().requires_grad_()
    optimizer = torch.optim.Adam([tokens], lr=lr)
    generator = torch.Generator(device=starts.device)
    # All starts side by side: the transitions once for each.
    count = len(trajectories)
    data = trajectories[torch.arange(count, device=starts.device).repeat(len(starts))]

    def predict(softness: float, drawn: torch.Generator | None) -> tuple[Prediction, Tensor]:
        each = tokens.repeat_interleave(count, 0)
        said: Prediction = model(data.states, each, data.mask, drawn, softness=softness)
        errors = squared_errors(said.states, data, model.scale).view(len(starts), -1)
        return said, errors.sum(1) / trajectories.mask.sum()

    before = predict(1.0, None)[1].detach()
    best, errors = starts.clone(), before.clone()
    for step in range(steps):
        generator.manual_seed(derive_seed(seed, "adapt", step))
        softness = max(1.0, _SOFTNESS ** (1 - step / (_SOFT * steps)))
        said, found = predict(softness, generator)
        each = tokens.detach().repeat_interleave(count, 0)
        slopes = gate_slopes(model, data, said, generator, each)
        loss = found.sum() + len(starts) * (slopes * said.adjacency).sum()
        (tokens.grad,) = torch.autograd.grad(loss, tokens)
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / steps))
        optimizer.step()
        if (step + 1) % 20 == 0 or step + 1 == steps:
            with torch.no_grad():
                now = predict(1.0, None)[1]
            better = now < errors
            best[better], errors[better] = tokens.detach()[better], now[better]
    chosen = int(errors.argmin())
    return Adaptation(best[chosen], float(errors[chosen]), chosen - 1, float(before[chosen]))


@torch.no_grad()
def compose(model: TransitionModel, data: Transitions) -> Tensor:
    """Return the sum of the known tokens that suit some object best, `[d]`.

    Args:
        model: A trained model.
        data: Transitions of one environment.
    """
    codebook = model.codebook.detach()
    errors = [
        squared_errors(model(data.states, token, data.mask).states, data, model.scale).sum(0)
        for token in codebook
    ]
    return codebook[torch.stack(errors).argmin(0).unique()].sum(0)
