r"""Attention through hard gates that depend on the state.

    q, k, v = W_q z, W_k z, W_v z           z: tokens, each with LayerNorm
    g_ij    = q_i · k_j / √d + b
    A_ij    ~ Bernoulli(sigmoid(g_ij))      without noise, when not training: 1[g_ij > 0]
    w_ij    = A_ij exp(q_i · k_j / √d) / (1 + Σ_j' A_ij' exp(q_i · k_j' / √d))
    h_i     = Σ_j w_ij v_j

As published, w is normalised by the sum over all j', open or closed, without the 1: then a token
that nobody attends to still changes every output through the denominator. Summing over open gates
only makes A exact, bit for bit, and is the default. The 1 is attention to nobody: a fully connected
model need not look anywhere. With b = 0 a gate is more likely open than closed exactly where the
sender outweighs nobody. h is not differentiable with respect to A; what that is to become is
decided by toggling it (`toggling`).

Source: Lei, Schölkopf, Posner, arXiv 2411.06890, section 4; there g is not divided by
√d and b = 0.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from spartan.gates import bernoulli, logistic_noise

Normalise = Literal["open", "dense"]
GateScale = Literal["sqrt_d", "none"]


class GatedAttention(nn.Module):
    """One head of gated attention.

    Args:
        width: d, features of a token.
        normalise: Over what weights are normalised: tokens with open gates and nobody, or, as
            published, all tokens.
        gate_scale: Whether g is divided by √d.
        gate_bias: b; above 0, gates start open.
        temperature: Of the sigmoid by which gradients lead from A to g. Above 1, they reach gates
            that are surely closed, so that what was closed too early opens again.
    """

    def __init__(
        self,
        width: int,
        normalise: Normalise = "open",
        gate_scale: GateScale = "sqrt_d",
        gate_bias: float = 0.0,
        temperature: float = 2.0,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.normalise = normalise
        self.gate_scale = gate_scale
        self.gate_bias = gate_bias
        self.temperature = temperature

    def forward(
        self,
        tokens: Tensor,
        present: Tensor,
        sharpness: Tensor | float = 1.0,
        shift: Tensor | float = 0.0,
        opening: Tensor | float = 0.0,
        softness: float = 1.0,
        generator: torch.Generator | None = None,
        adjacency: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Attend.

        Args:
            tokens: `[B, n, d]`.
            present: Boolean `[B, n, n]`: both tokens are there; other gates are closed.
            sharpness: Factor of g.
            shift: Added to every g but those of the last token, the intervention's.
            opening: Added to every g.
            softness: Divides q · k of the last token, and so its g.
            generator: Draws the gates; without it they are open where g > 0.
            adjacency: Gates to use instead of the model's own, 0 or 1, `[B, n, n]`.

        Returns:
            h `[B, n, d]`, and A, w, P(A = 1) and g before it is sharpened, `[B, n, n]`.
        """
        q, k, v = self.query_key_value(self.norm(tokens)).chunk(3, -1)
        root = math.sqrt(q.shape[-1])
        logits = q @ k.transpose(-2, -1) / root
        logits = torch.cat((logits[..., :-1], logits[..., -1:] / softness), -1)
        gate = logits if self.gate_scale == "sqrt_d" else logits * root
        gate = gate + (self.gate_bias + opening)
        gate = torch.cat((gate[..., :-1] + shift, gate[..., -1:]), -1)
        if adjacency is None:
            sharp = sharpness * gate
            noise = None if generator is None else logistic_noise(sharp, generator)
            adjacency = bernoulli(sharp, noise, self.temperature)
            probability = sharp.detach().sigmoid() * present
        else:
            probability = adjacency.detach() * present
        adjacency = adjacency * present
        weights = gated_softmax(logits, adjacency, present, self.normalise)
        return weights @ v, adjacency, weights, probability, gate


def gated_softmax(
    logits: Tensor, adjacency: Tensor, present: Tensor, normalise: Normalise
) -> Tensor:
    """Return the attention weights w, `[B, n, n]`; a row whose gates are all closed is 0.

    They are not differentiable with respect to the gates.
    """
    opened = adjacency.detach()
    if normalise == "dense":
        # Finite, so that rows of which nothing is there are not NaN.
        masked = logits.masked_fill(~present, torch.finfo(logits.dtype).min)
        return opened * masked.softmax(-1)
    masked = logits.masked_fill(opened == 0, -math.inf)
    return pad(masked, (0, 1)).softmax(-1)[..., :-1]
