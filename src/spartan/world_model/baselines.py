r"""Baseline graphs: global graph, nearest objects, thresholded attention, constant graph.

* One graph for all states: a learned Bernoulli adjacency, and a perceptron for each object on what
  the adjacency lets through. After the factored world models of Huang et al., "AdaRL", ICLR 2022.
* Attention over the k nearest objects.
* A dense transformer whose attention is thresholded: an edge where the product over layers of
  (W^l + I), with the attention weights W^l, exceeds a number. After Pitis, Creager, Garg,
  "Counterfactual Data Augmentation using Locally Factored Dynamics", NeurIPS 2020.
* The constant graph that is right most often, without any learning.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from spartan.errors import WorldError
from spartan.gates import bernoulli, logistic_noise
from spartan.world_model.model import (
    Prediction,
    TransitionConfig,
    TransitionModel,
    Waves,
    WorldModel,
    look_up,
    make_codebook,
)
from spartan.world_model.paths import path_matrix
from spartan.world_model.transitions import Transitions

_NO_READER = (0, 0, 0, 1)  # to pad gates by: the intervention reads nothing


class GlobalGraph(WorldModel):
    """One adjacency for all states, which gates the inputs of a perceptron for each object.

    Args:
        config: Sizes; `layers`, `normalise` and the gates' scale have no meaning here.
        objects: N; each has its own place in the graph.
    """

    def __init__(self, config: TransitionConfig, objects: int) -> None:
        super().__init__(config)
        self.waves = Waves(config.frequencies)
        features = config.features * (1 + 2 * config.frequencies)
        inputs, hidden = objects * features + config.width, 2 * config.hidden
        self.gate_logits = nn.Parameter(torch.full((objects, objects + 1), 1.0))
        self.codebook = make_codebook(config)
        sizes = ((inputs + objects + 1, hidden), (hidden, hidden), (hidden, config.changing))
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(objects, rows, columns) / rows**0.5) for rows, columns in sizes
        )
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(objects, 1, columns)) for _, columns in sizes
        )

    def forward(
        self,
        states: Tensor,
        environment: Tensor,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        adjacency: Tensor | None = None,
        severed: Tensor | None = None,
    ) -> Prediction:
        """Predict one step, as `TransitionModel` does; `environment` are integers."""
        self.check(states, environment, mask)
        batch, n, _ = states.shape
        if n != len(self.gate_logits) or environment.is_floating_point():
            raise WorldError(
                f"{n} objects given, and {len(self.gate_logits)} needed; environments are numbers."
            )
        token = look_up(self.codebook, environment, self.config)
        there = torch.ones_like(states[..., 0], dtype=torch.bool) if mask is None else mask
        senders = torch.cat((there, token.ne(0).any(-1, keepdim=True)), 1)
        present = pad(there, (0, 1)).unsqueeze(-1) & senders.unsqueeze(1)
        if severed is not None:
            present &= ~severed
        logits = self._logits(batch)
        if adjacency is None:
            adjacency, probability = self._draw(logits, generator)
        else:
            probability = adjacency.detach()
        adjacency = adjacency * present
        gates = adjacency[0, :, :-1].detach()
        own = torch.eye(n, device=states.device)
        visible = torch.maximum(gates[..., :-1], own)
        seen = (visible.unsqueeze(-1) * self.waves(states).unsqueeze(1)).flatten(2)
        read = gates[..., -1:] * token.unsqueeze(1)
        values = torch.cat((seen, read, gates), -1).transpose(0, 1)
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            values = torch.baddbmm(bias, values, weight)
            values = torch.nn.functional.silu(values) if number < 2 else values
        following = states[..., : self.config.changing] + self.scale * values.transpose(0, 1)
        return Prediction(
            states=following,
            adjacency=adjacency,
            weights=adjacency.detach(),
            probability=probability * present,
            present=present.unsqueeze(0),
            logits=pad(logits, _NO_READER),
        )

    def _logits(self, batch: int) -> Tensor:
        """Return g, the same for all states, `[1, batch, N, N + 1]`."""
        shift = pad(self.gate_shift.expand(len(self.gate_logits)), (0, 1))
        return (self.gate_logits + shift + self.opening).expand(1, batch, -1, -1)

    def _draw(self, logits: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return A and P(A = 1), `[1, batch, N + 1, N + 1]`; the intervention reads nothing."""
        sharp = self.sharpness * logits
        noise = None if generator is None else logistic_noise(sharp, generator)
        adjacency = bernoulli(sharp, noise, self.config.temperature)
        return pad(adjacency, _NO_READER), pad(sharp.detach().sigmoid(), _NO_READER)


class NearestObjects(TransitionModel):
    """Attention over the k nearest objects, by the first two features, and the intervention.

    Args:
        config: Sizes, with mode "dense"; the intervention is read in the first layer.
        neighbours: k.
    """

    def __init__(self, config: TransitionConfig, neighbours: int = 1) -> None:
        super().__init__(replace(config, token_layers="all"))
        if config.mode != "dense" or neighbours < 1:
            raise WorldError(
                f'mode={config.mode!r} and neighbours={neighbours} given; "dense" and a positive '
                "number needed."
            )
        self.neighbours = neighbours

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
        """Predict one step, as `TransitionModel` does."""
        n = states.shape[1]
        distance = torch.cdist(states[..., :2], states[..., :2])
        distance = distance.masked_fill(
            torch.eye(n, dtype=torch.bool, device=states.device), torch.inf
        )
        if mask is not None:
            distance = distance.masked_fill(~mask.unsqueeze(1), torch.inf)
        nearest = distance.topk(min(self.neighbours, n - 1), largest=False).indices
        gates = states.new_zeros(len(states), n + 1, n + 1)
        gates[:, :-1, :-1] = torch.zeros_like(distance).scatter(-1, nearest, 1.0)
        gates[:, :-1, :-1] += torch.eye(n, device=states.device)
        gates[:, :, -1] = 1.0
        # One layer looks at neighbours, so that there are no neighbours of neighbours.
        rest = torch.eye(n + 1, device=states.device).expand_as(gates)
        layers = [gates, *[rest] * (self.config.layers - 1)]
        given = torch.stack(layers)
        return super().forward(states, environment, mask, None, given, severed, softness)


def attention_paths(prediction: Prediction) -> Tensor:
    """Return how much output i reads of token j by the attention weights, `[B, N, N + 1]`."""
    return path_matrix(prediction.weights)[..., :-1, :]


def constant_graph(data: Transitions) -> Tensor:
    """Return the constant graph with the least Hamming distance, boolean `[N, N + 1]`.

    The last column is that of the intervention.

    Raises:
        WorldError: The data has no true graphs.
    """
    if data.edges is None or data.targets is None:
        raise WorldError("These transitions do not tell the true graphs.")
    both = (data.mask.unsqueeze(1) & data.mask.unsqueeze(2)).float().sum(0)
    edges = data.edges.float().sum(0) > both / 2
    targets = data.targets.float().sum(0) > data.mask.float().sum(0) / 2
    return torch.cat((edges, targets.unsqueeze(1)), 1)
