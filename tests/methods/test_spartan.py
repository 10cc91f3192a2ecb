"""Spartan against the published update rule."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spartan import Block, Budget, Sparsifier, Unstructured
from spartan.errors import MethodError
from spartan.methods import DualAveraging, Magnitude, MaskingMethod, Spartan
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.methods.masking.spartan import SoftMask
from tests.conftest import VECTORS


def soft_mask(weight: MaskedWeight) -> torch.Tensor:
    """The soft mask of each unit, whether it is stored or follows from the dual variable."""
    if weight.dual is not None:
        return weight.dual.mask(weight.scores())
    stored = weight.state_as(SoftMask).soft
    assert stored is not None
    return stored


# The published run prunes its last layer away before it grows back.
@pytest.mark.filterwarnings("ignore:Nothing is kept")
def test_published_trajectory() -> None:
    facts = json.loads((VECTORS / "spartan_trajectory.json").read_text(encoding="utf-8"))
    tensors = load_file(VECTORS / "spartan_trajectory.safetensors")
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2)).double()
    model.load_state_dict({k: tensors[f"init.{k}"] for k in model.state_dict()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    budget = Budget(density=141 / 1408, layer_floor=0)
    method = Spartan.published(warmup=0.0)
    sparsifier = Sparsifier(model, optimizer, method, budget, facts["steps"])
    losses = []
    for _ in range(facts["steps"]):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tensors["X"]), tensors["Y"])
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    sparsifier.finalize()
    expected = tensors["losses"]
    torch.testing.assert_close(torch.tensor(losses).double(), expected, rtol=0, atol=1e-6)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, tensors[f"final.{name}"], rtol=0, atol=1e-5)
    assert sum(int(model[i].weight.count_nonzero()) for i in (0, 2)) == 141


class Weights(nn.Module):
    """Bare weight matrices under names that are prunable when included."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], False) for w in weights)
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight = nn.Parameter(weight.clone())


METHODS_OF_MODES = {
    "spartan": lambda beta: Spartan(beta=(beta, beta), beta_scale="absolute", warmup=0.0),
    "dual_averaging": lambda beta: DualAveraging(warmup=0.0),
    "standard": lambda beta: Magnitude(schedule="one-shot"),
}


def test_masked_layers_match_the_vectors(vectors: dict[str, Any]) -> None:
    for case in vectors["masked_layers"]:
        weights = [torch.tensor(x["weight"], dtype=torch.float64) for x in case["layers"]]
        rows, cols = case["block_dims"]
        model = Weights(weights)
        # Plain gradient descent with lr 1 from θ to θ - gradient shows the gradient of θ.
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        beta = case["beta"]
        method: MaskingMethod = METHODS_OF_MODES[case["mode"]](beta)
        pattern = Unstructured() if rows * cols == 1 else Block(rows, cols)
        units = sum(w.numel() for w in weights) // (rows * cols)
        budget = Budget(density=math.floor(case["budget"] / (rows * cols)) / units)
        sparsifier = Sparsifier(model, optimizer, method, budget, 100, pattern=pattern)
        close = {"rtol": 0, "atol": 1e-12}
        for layer, expected, weight in zip(
            model.layers, case["layers"], sparsifier.weights, strict=True
        ):
            forward = torch.tensor(expected["forward_weight"], dtype=torch.float64)
            torch.testing.assert_close(layer.weight.data, forward, **close)
            if case["mode"] == "spartan":
                soft = soft_mask(weight)
                expected_soft = torch.tensor(expected["soft_mask"], dtype=torch.float64)
                torch.testing.assert_close(soft, expected_soft, **close)
            grad = torch.tensor(expected["grad_forward_weight"], dtype=torch.float64)
            layer.weight.grad = grad
        optimizer.step()
        for layer, expected in zip(model.layers, case["layers"], strict=True):
            wanted = torch.tensor(expected["grad_weight"], dtype=torch.float64)
            torch.testing.assert_close(layer.weight.grad, wanted, **close)


def test_relative_beta_does_not_depend_on_the_scale_of_the_weights() -> None:
    masks = []
    for scale in (1.0, 1e-3):
        torch.manual_seed(0)
        model = nn.Linear(30, 20)
        with torch.no_grad():
            model.weight.mul_(scale)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = Sparsifier(
            model, optimizer, Spartan(warmup=0.0, beta=(35.0, 35.0)), Budget(density=0.1), 10
        )
        masks.append(soft_mask(sparsifier.weights[0]))
    torch.testing.assert_close(masks[0], masks[1], rtol=1e-3, atol=1e-5)
    assert 0.05 < float(masks[0].max()) < 1.0


def test_all_zero_weights_are_selected_by_position() -> None:
    model = nn.Linear(10, 10)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, Spartan(warmup=0.0), Budget(density=0.2), 10)
    assert sparsifier.weights[0].mask.flatten().nonzero().flatten().tolist() == list(range(20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": (0.0, 1.0)}, "two positive numbers"),
        ({"beta_scale": "log"}, "relative, absolute"),
        ({"warmup": 1.5}, "between 0 and 1"),
        ({"warmup": 0.5, "finetune": 0.6}, "overlap"),
        ({"finetune": -0.1}, "between 0 and 1"),
        ({"annealing": "step"}, "unknown"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        Spartan(**settings)
