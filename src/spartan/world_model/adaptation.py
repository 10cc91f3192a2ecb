r"""Fitting the one token of an unknown intervention to a few trajectories.

    T_adapt = argmin_T  E MSE(f(x, T), x')          all weights of f as they are

The loss in T has plateaus where no gate to the token is open, so that descent starts from each
entry of the codebook and from their mean, side by side, and the best is taken.

Source: Lei, Schölkopf, Posner, arXiv 2411.06890, section 4; starts and optimiser are our own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spartan.errors import WorldError
from spartan.seeds import derive_seed
from spartan.world_model.model import Prediction, TransitionModel
from spartan.world_model.transitions import Transitions


@dataclass(frozen=True)
class Adaptation:
    """What adapting found.

    Attributes:
        token: T_adapt, `[d]`; give it as `environment` to the model.
        error: On the trajectories, in units of σ.
        start: Entry of the codebook it began from; -1 for the mean of all.
        start_error: Of that entry before adapting.
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
    lr: float = 0.05,
    seed: int = 0,
) -> Adaptation:
    """Fit an intervention's token to trajectories of an unknown environment.

    The model is left as it is: no weight, no gradient and no mode changes.

    Args:
        model: A trained model.
        trajectories: Transitions of the environment; what they say of it is not read.
        steps: Of Adam, for each start.
        lr: Adam's rate.
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
    starts = torch.cat((codebook.mean(0, keepdim=True), codebook))
    tokens = starts.clone().requires_grad_()
    optimizer = torch.optim.Adam([tokens], lr=lr)
    generator = torch.Generator(device=starts.device)
    before = _errors(model, tokens, trajectories, None).detach()
    best, errors = starts.clone(), before.clone()
    for step in range(steps):
        generator.manual_seed(derive_seed(seed, "adapt", step))
        loss = _errors(model, tokens, trajectories, generator).sum()
        (tokens.grad,) = torch.autograd.grad(loss, tokens)
        optimizer.step()
        if (step + 1) % 20 == 0 or step + 1 == steps:
            with torch.no_grad():
                now = _errors(model, tokens, trajectories, None)
            better = now < errors
            best[better], errors[better] = tokens.detach()[better], now[better]
    chosen = int(errors.argmin())
    return Adaptation(best[chosen], float(errors[chosen]), chosen - 1, float(before[chosen]))


def _errors(
    model: TransitionModel, tokens: Tensor, data: Transitions, generator: torch.Generator | None
) -> Tensor:
    """Return the error with each token, `[S]`; gates are drawn if there is a generator."""
    starts, count = len(tokens), len(data)
    prediction: Prediction = model(
        data.states.repeat(starts, 1, 1),
        tokens.repeat_interleave(count, 0),
        data.mask.repeat(starts, 1),
        generator,
    )
    wrong = (prediction.states - data.following.repeat(starts, 1, 1)) / model.scale
    squared = wrong.square().mean(-1) * data.mask.repeat(starts, 1)
    return squared.view(starts, -1).sum(1) / data.mask.sum()
