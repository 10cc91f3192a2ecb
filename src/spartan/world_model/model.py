r"""The transition model: a transformer over object tokens with hard, learned gates.

    s^0   = tokeniser(x), and T_I as one more token      x: features of each object
    s^l   = MLP(h^l + s^(l-1))                           h^l: gated attention over s^(l-1)
    x̂'    = x + σ ⊙ W s^L                                of the features that change

σ is the usual change of each feature, so that an error of 1 is that of predicting no change.

Source: Lei, Schölkopf, Posner, arXiv 2411.06890, section 4 and appendix A.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spartan.errors import WorldError
from spartan.world_model.attention import GatedAttention, GateScale, Normalise
from spartan.world_model.paths import Graph, read_graph
from spartan.world_model.transitions import Transitions

Mode = Literal["sparse", "dense", "identity"]
TokenLayers = Literal["all", "last"]
# Of the intervention's tokens. With 0.1, gates to some of them closed for good, on one seed of two.
TOKEN_SCALE = 0.4


@dataclass(frozen=True)
class TransitionConfig:
    """Sizes of a transition model.

    Attributes:
        features: Features of an object, F.
        changing: The first how many of them change with time, D; the rest is what the object is.
        environments: Interventions seen in training, K; one of them may be "none".
        width: d, features of a token.
        layers: L.
        hidden: Units of each hidden layer of the perceptrons.
        mode: `"sparse"` learns the gates; `"dense"` has all open, `"identity"` all closed.
        normalise: Whether attention is normalised over open gates and nobody or, as published, over
            all tokens.
        gate_scale: Whether gate logits are divided by √d.
        gate_bias: Added to gate logits; above 0, gates start open.
        temperature: Of the sigmoid by which gradients lead from gates to their logits.
        frequencies: How many sines and cosines of each feature the tokeniser gets besides it; they
            help where thresholds decide, and hinder where directions do.
        observational: Whether environment 0 is the one without an intervention. Its token is 0, and
            a token of zeros is not there: nothing can read it. What is predicted without reading a
            token is then what happens without an intervention.
        token_reads: Whether the intervention's token reads objects, as published. Otherwise nothing
            influences an intervention, and no route leads from object to object through it.
        token_layers: In which layers the intervention's token is read: `"all"`, as published, going
            through them as objects do; or `"last"`, as it is. What it means to one object it can
            then mean to others, too: a token for two is near the sum of the tokens for each. And no
            object passes on what it read of it.
    """

    features: int
    changing: int
    environments: int = 1
    width: int = 32
    layers: int = 2
    hidden: int = 64
    mode: Mode = "sparse"
    normalise: Normalise = "open"
    gate_scale: GateScale = "sqrt_d"
    gate_bias: float = 0.0
    temperature: float = 2.0
    frequencies: int = 0
    observational: bool = True
    token_reads: bool = False
    token_layers: TokenLayers = "all"

    def __post_init__(self) -> None:
        for name in ("features", "changing", "environments", "width", "layers", "hidden"):
            if getattr(self, name) < 1:
                raise WorldError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.frequencies < 0:
            raise WorldError(f"frequencies={self.frequencies} must not be negative.")
        if self.changing > self.features:
            raise WorldError(f"changing={self.changing} is more than features={self.features}.")
        if not self.temperature > 0:
            raise WorldError(f"temperature={self.temperature} must be positive.")
        for name, allowed in (
            ("mode", ("sparse", "dense", "identity")),
            ("normalise", ("open", "dense")),
            ("gate_scale", ("sqrt_d", "none")),
            ("token_layers", ("all", "last")),
        ):
            if getattr(self, name) not in allowed:
                raise WorldError(f"{name}={getattr(self, name)!r} must be one of {allowed}.")
        if self.token_reads and self.token_layers == "last":
            raise WorldError(
                'token_layers="last" and token_reads=True given: a token that is read as it is '
                "reads nothing itself; leave one of them out."
            )


@dataclass(frozen=True)
class Prediction:
    """What a model says of some states.

    Attributes:
        states: Next value of the features that change, `[B, N, D]`.
        adjacency: A of each layer, exactly 0 or 1, `[L, B, N + 1, N + 1]`. Differentiable; the
            states are not differentiable with respect to it (see `toggling`).
        weights: w, the attention weights of each layer, same shape.
        probability: P(A = 1), same shape; A itself where it was given.
        present: Which gates could be open, boolean `[L, B, N + 1, N + 1]`.
        logits: g, before it is sharpened, same shape as A; differentiable.
    """

    states: Tensor
    adjacency: Tensor
    weights: Tensor
    probability: Tensor
    present: Tensor
    logits: Tensor

    def rest(self, count: int) -> Prediction:
        """Return what is said of all states but the first `count`."""
        return Prediction(
            self.states[count:],
            self.adjacency[:, count:],
            self.weights[:, count:],
            self.probability[:, count:],
            self.present[:, count:],
            self.logits[:, count:],
        )

    def graph(self) -> Graph:
        """Read the local causal graphs."""
        return read_graph(self.adjacency)


class WorldModel(nn.Module):
    """What every model of transitions has; called as `TransitionModel` is.

    Args:
        config: Sizes.

    Attributes:
        scale: σ, `[D]`.
        sharpness: Factor of the gate logits; training raises it.
        opening: Added to all gate logits; training lowers it to 0.
        gate_shift: Added to the gate logits between objects; an edge budget is met exactly by it.
    """

    scale: Tensor
    sharpness: Tensor
    opening: Tensor
    gate_shift: Tensor

    def __init__(self, config: TransitionConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("scale", torch.ones(config.changing))
        self.register_buffer("sharpness", torch.ones(()))
        self.register_buffer("opening", torch.zeros(()))
        self.register_buffer("gate_shift", torch.zeros(()))

    @torch.no_grad()
    def fit_scale(self, data: Transitions) -> None:
        """Set σ to the root mean square change of each feature."""
        change = data.following - data.states[..., : self.config.changing]
        scale = change[data.mask].square().mean(0).sqrt()
        self.scale.copy_(torch.where(scale > 0, scale, torch.ones_like(scale)))

    def check(self, states: Tensor, environment: Tensor, mask: Tensor | None) -> None:
        """Raise `WorldError` if inputs do not fit."""
        config = self.config
        if states.dim() != 3 or states.shape[-1] != config.features:
            raise WorldError(
                f"states of shape {tuple(states.shape)} given; [B, N, {config.features}] needed."
            )
        shape = tuple(environment.shape)
        token = environment.is_floating_point()
        allowed = [(config.width,), (len(states), config.width)] if token else [(len(states),)]
        if shape not in allowed:
            raise WorldError(
                f"environment of shape {shape} given; integers [{len(states)}], or tokens "
                f"[{config.width}] or [{len(states)}, {config.width}], needed."
            )
        if not token and (environment.dtype == torch.bool or _outside(environment, config)):
            raise WorldError(
                f"environment must hold numbers below {config.environments}, or tokens."
            )
        if mask is not None and (mask.shape != states.shape[:2] or mask.dtype != torch.bool):
            raise WorldError(
                f"mask of shape {tuple(mask.shape)}, {mask.dtype}, given; boolean "
                f"{tuple(states.shape[:2])} needed."
            )


class TransitionModel(WorldModel):
    """Predicts the next state of every object, and which objects it read for that.

    Args:
        config: Sizes.

    Attributes:
        codebook: Tokens of the interventions seen in training, `[K, d]`.
    """

    def __init__(self, config: TransitionConfig) -> None:
        super().__init__(config)
        self.tokeniser = nn.Sequential(
            Waves(config.frequencies),
            nn.Linear(config.features * (1 + 2 * config.frequencies), config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.width),
        )
        self.codebook = make_codebook(config)
        self.blocks = nn.ModuleList(_TransformerBlock(config) for _ in range(config.layers))
        self.decoder = nn.Linear(config.width, config.changing)

    def forward(
        self,
        states: Tensor,
        environment: Tensor,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        adjacency: Tensor | None = None,
        severed: Tensor | None = None,
        softness: float = 1.0,
    ) -> Prediction:
        """Predict one step.

        Args:
            states: Features of the objects, `[B, N, F]`.
            environment: Which intervention, integers `[B]`; or tokens of one, `[d]` or `[B, d]`,
                zeros for none.
            mask: Which objects are there, boolean `[B, N]`; all by default.
            generator: Draws the gates, in training; without it they are open where that has a
                probability above 1/2.
            adjacency: Gates to use instead of the model's own, `[L, B, N + 1, N + 1]`.
            severed: Gates that are closed in all layers, whatever else says, boolean
                `[B, N + 1, N + 1]`.
            softness: What the logits of the intervention's token are divided by; the larger, the
                nearer its gates are to being open half of the time, whatever the model learned.

        Raises:
            WorldError: Shapes do not fit.
        """
        self.check(states, environment, mask)
        batch, objects, _ = states.shape
        token = environment
        if not token.is_floating_point():
            token = look_up(self.codebook, environment, self.config)
        token = token.expand(batch, self.config.width).unsqueeze(1)
        tokens = torch.cat((self.tokeniser(states), token), 1)
        there = torch.ones(batch, objects + 1, dtype=torch.bool, device=states.device)
        if mask is not None:
            there[:, :-1] = mask
        there[:, -1] = token.squeeze(1).ne(0).any(-1)
        present = (there.unsqueeze(-1) & there.unsqueeze(-2)).repeat(self.config.layers, 1, 1, 1)
        present[:, :, -1] &= self.config.token_reads
        if self.config.token_layers == "last":
            present[:-1, ..., -1] = False
        if severed is not None:
            present &= ~severed
        if adjacency is None and self.config.mode != "sparse":
            level = 1.0 if self.config.mode == "dense" else 0.0
            adjacency = tokens.new_full((self.config.layers, 1, 1, 1), level)
        layers = []
        block: Any
        for number, block in enumerate(self.blocks):
            given = None if adjacency is None else adjacency[number]
            h, *gates = block.attention(
                tokens,
                present[number],
                self.sharpness,
                self.gate_shift,
                self.opening,
                softness,
                generator,
                given,
            )
            tokens = block.perceptron(h + tokens)
            if self.config.token_layers == "last":
                tokens = torch.cat((tokens[:, :-1], token), 1)
            layers.append(gates)
        change = self.decoder(tokens[:, :-1])
        following = states[..., : self.config.changing] + self.scale * change
        opened, weights, probability, logits = map(torch.stack, zip(*layers, strict=True))
        return Prediction(following, opened, weights, probability, present, logits)


def make_codebook(config: TransitionConfig) -> nn.Parameter:
    """Return the tokens of the interventions, `[K, d]`."""
    tokens = TOKEN_SCALE * torch.randn(config.environments, config.width)
    if config.observational:
        tokens[0] = 0
    return nn.Parameter(tokens)


def look_up(codebook: Tensor, environment: Tensor, config: TransitionConfig) -> Tensor:
    """Return the tokens of some environments, `[B, d]`; that of the observational one stays 0."""
    return nn.functional.embedding(environment, codebook, 0 if config.observational else None)


def _outside(environment: Tensor, config: TransitionConfig) -> bool:
    return bool(((environment < 0) | (environment >= config.environments)).any())


class Waves(nn.Module):
    """x, sin 2^k π x / 2 and cos 2^k π x / 2 for k below a number of frequencies."""

    factors: Tensor

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        factors = torch.pi / 2 * 2.0 ** torch.arange(frequencies)
        self.register_buffer("factors", factors, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        phases = (features.unsqueeze(-1) * self.factors).flatten(-2)
        return torch.cat((features, phases.sin(), phases.cos()), -1)


class _TransformerBlock(nn.Module):
    """What s ← MLP(h + s) is computed by; the perceptron has three linear layers."""

    def __init__(self, config: TransitionConfig) -> None:
        super().__init__()
        self.attention = GatedAttention(
            config.width,
            config.normalise,
            config.gate_scale,
            config.gate_bias,
            config.temperature,
        )
        self.perceptron = nn.Sequential(
            nn.Linear(config.width, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, config.width),
        )
