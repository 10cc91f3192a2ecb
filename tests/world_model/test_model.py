"""What the gates of a transition model promise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spartan.errors import FileError, WorldError
from spartan.world_model import (
    GatedAttention,
    GlobalGraph,
    NearestObjects,
    TransitionConfig,
    TransitionModel,
    WorldModel,
    load_model,
    reachable,
    save_model,
)
from spartan.world_model.attention import gated_softmax
from spartan.world_model.metrics import ancestors

CONFIG = TransitionConfig(features=5, changing=3, environments=2, width=16, hidden=24)
B, N = 40, 4


def make(config: TransitionConfig = CONFIG, seed: int = 0) -> TransitionModel:
    torch.manual_seed(seed)
    model = TransitionModel(config)
    # Gates that differ from state to state, about half of them open.
    for block in model.blocks:
        block.attention.query_key_value.weight.data *= 3  # type: ignore[union-attr, operator]
    return model.eval()


def draw(seed: int = 1, objects: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(B, objects, CONFIG.features, generator=generator)
    return states, torch.arange(B) % CONFIG.environments


def other_object(states: Tensor, j: int) -> Tensor:
    moved = states.clone()
    moved[:, j] = states.roll(1, 0)[:, j] + 1
    return moved


def leaks(normalise: str) -> tuple[int, int]:
    """Count outputs that a token without a path moves, and those that one with a path moves."""
    model = make(replace(CONFIG, normalise=normalise))
    states, environment = draw()
    before = model(states, environment)
    paths = reachable(before.adjacency)
    without, with_path = 0, 0
    for j in range(N):
        after = model(other_object(states, j), environment, adjacency=before.adjacency)
        moved = (after.states != before.states).any(-1)
        without += int((moved & ~paths[:, :N, j]).sum())
        with_path += int((moved & paths[:, :N, j]).sum())
    pairs = int(paths[:, :N, :N].sum())
    assert 0.2 < pairs / (B * N * N) < 0.95
    return without, pairs - with_path


@torch.no_grad()
def test_no_path_is_no_influence_bit_for_bit() -> None:
    assert leaks("open") == (0, 0)


@torch.no_grad()
def test_the_published_normaliser_leaks() -> None:
    assert leaks("dense")[0] > 0


@torch.no_grad()
def test_adjacency_is_exact() -> None:
    model = make()
    states, environment = draw()
    for generator in (None, torch.Generator().manual_seed(0)):
        adjacency = model(states, environment, generator=generator).adjacency
        assert adjacency.shape == (CONFIG.layers, B, N + 1, N + 1)
        assert not bool(adjacency[:, :, N].any())  # nothing influences the intervention
        assert set(adjacency.unique().tolist()) == {0.0, 1.0}


@torch.no_grad()
def test_permuting_objects_permutes_everything() -> None:
    model = make()
    states, environment = draw()
    order = torch.tensor([2, 0, 3, 1])
    tokens = torch.cat((order, torch.tensor([N])))
    before, after = model(states, environment), model(states[:, order], environment)
    torch.testing.assert_close(after.states, before.states[:, order])
    assert torch.equal(after.adjacency, before.adjacency[:, :, tokens][..., tokens])


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    model = make()
    states, environment = draw()
    padded = torch.cat((states, 100 * torch.ones(B, 2, CONFIG.features)), 1)
    mask = torch.ones(B, N + 2, dtype=torch.bool)
    mask[:, N:] = False
    before, after = model(states, environment), model(padded, environment, mask)
    torch.testing.assert_close(after.states[:, :N], before.states)
    assert not bool(after.adjacency[:, :, N : N + 2].any())
    assert not bool(after.adjacency[..., N : N + 2].any())


@torch.no_grad()
def test_objects_without_a_path_can_be_removed() -> None:
    model = make(replace(CONFIG, gate_bias=-0.5))
    states, environment = draw()
    before = model(states, environment)
    keep = ancestors(before.graph().edges)
    assert float((~keep).float().mean()) > 0.1
    for i in range(N):
        after = model(states, environment, keep[:, i])
        torch.testing.assert_close(after.states[:, i], before.states[:, i], rtol=0, atol=1e-6)


@torch.no_grad()
def test_gates_are_drawn_from_the_generator_alone() -> None:
    model = make()
    states, environment = draw()

    def adjacency(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        found: Tensor = model(states, environment, generator=generator).adjacency
        return found

    assert torch.equal(adjacency(3), adjacency(3))
    assert not torch.equal(adjacency(3), adjacency(4))
    assert torch.equal(adjacency(None), adjacency(None))


def test_rows_without_an_open_gate_are_zero_and_have_gradients() -> None:
    torch.manual_seed(0)
    attention = GatedAttention(8)
    tokens = torch.randn(2, 5, 8, requires_grad=True)
    present = torch.ones(2, 5, 5, dtype=torch.bool)
    for normalise in ("open", "dense"):
        attention.normalise = normalise
        for level in (0.0, 1.0):
            h, *_ = attention(tokens, present, adjacency=torch.full((2, 5, 5), level))
            assert bool(h.any()) == (level == 1)
            (gradient,) = torch.autograd.grad(h.square().sum(), tokens)
            assert bool(gradient.isfinite().all())
    nothing, *_ = attention(tokens, ~present, adjacency=torch.ones(2, 5, 5))
    (gradient,) = torch.autograd.grad(nothing.sum(), tokens)
    assert not bool(nothing.any())
    assert not bool(gradient.any())


def test_what_is_not_read_has_no_gradient() -> None:
    logits = torch.tensor([[[2.0, 0.0, -1.0]]], requires_grad=True)
    adjacency = torch.tensor([[[1.0, 1.0, 0.0]]])
    values = torch.randn(1, 3, 4, requires_grad=True)
    present = torch.ones(1, 1, 3, dtype=torch.bool)
    (gated_softmax(logits, adjacency, present, "open") @ values).sum().backward()
    assert values.grad is not None
    assert logits.grad is not None
    assert values.grad[0].any(-1).tolist() == [True, True, False]
    assert logits.grad[0, 0].ne(0).tolist() == [True, True, False]


def test_open_gates_weigh_as_a_softmax_over_them_and_nobody() -> None:
    logits = torch.randn(3, 4, 6)
    adjacency = (torch.rand(3, 4, 6) < 0.5).float()
    adjacency[..., 0] = 1
    present = torch.ones(3, 4, 6, dtype=torch.bool)
    # Nobody is one more choice, of logit 0.
    nobody = torch.cat((logits.masked_fill(adjacency == 0, -torch.inf), torch.zeros(3, 4, 1)), -1)
    found = gated_softmax(logits, adjacency, present, "open")
    torch.testing.assert_close(found, nobody.softmax(-1)[..., :-1])
    published = gated_softmax(logits, adjacency, present, "dense")
    torch.testing.assert_close(published, adjacency * logits.softmax(-1))


def test_huge_logits_of_closed_gates_are_finite() -> None:
    logits = torch.tensor([[[0.0, 1e4]]], requires_grad=True)
    present = torch.ones(1, 1, 2, dtype=torch.bool)
    weights = gated_softmax(logits, torch.tensor([[[1.0, 0.0]]]), present, "open")
    weights[0, 0, 0].backward()
    assert weights.tolist() == [[[0.5, 0.0]]]
    assert logits.grad is not None
    assert logits.grad.tolist() == [[[0.25, 0.0]]]


def test_huge_logits_of_open_gates_leave_nothing_to_nobody() -> None:
    logits = torch.tensor([[[1e4, -1e4]]])
    adjacency, present = torch.ones(1, 1, 2), torch.ones(1, 1, 2, dtype=torch.bool)
    assert gated_softmax(logits, adjacency, present, "open").tolist() == [[[1.0, 0.0]]]


@torch.no_grad()
def test_severed_gates_are_closed_in_all_layers() -> None:
    states, environment = draw()
    severed = torch.rand(B, N + 1, N + 1, generator=torch.Generator().manual_seed(2)) < 0.5
    for mode in ("sparse", "dense"):
        model = make(replace(CONFIG, mode=mode))
        found = model(states, environment, severed=severed).adjacency
        whole = model(states, environment).adjacency
        assert not bool(found[:, severed].any())
        # Gates of the first layer know nothing of what is severed.
        assert torch.equal(found[0], whole[0] * ~severed)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["dense", "identity"])
def test_modes(mode: str) -> None:
    model = make(replace(CONFIG, mode=mode))
    states, environment = draw()
    prediction = model(states, torch.ones_like(environment), generator=torch.Generator())
    found = prediction.adjacency[:, :, :N]
    assert set(found.unique().tolist()) == {float(mode == "dense")}
    assert prediction.graph().edges.any().item() == (mode == "dense")


@torch.no_grad()
def test_tokens_in_place_of_environments() -> None:
    model = make()
    states, environment = draw()
    token = model.codebook[1]
    by_number = model(states, torch.ones_like(environment)).states
    assert torch.equal(model(states, token).states, by_number)
    assert torch.equal(model(states, token.expand(B, -1)).states, by_number)


@torch.no_grad()
def test_without_an_intervention_there_is_no_token_to_read() -> None:
    model = make()
    states, environment = draw()
    assert not bool(model.codebook[0].any())
    found = model(states, environment)
    without = environment == 0
    assert not bool(found.adjacency[:, without, :, N].any())
    assert bool(found.adjacency[:, ~without, :, N].any())
    assert not bool(model(states, torch.zeros(CONFIG.width)).graph().targets.any())
    told = make(replace(CONFIG, observational=False))
    assert bool(told(states, environment).adjacency[:, without, :, N].any())


@torch.no_grad()
def test_a_token_of_the_last_layer_is_read_there_alone_and_as_it_is() -> None:
    for layers in (1, 2, 3):
        model = make(replace(CONFIG, layers=layers, token_layers="last"))
        states, _ = draw()
        token = torch.randn(CONFIG.width, generator=torch.Generator().manual_seed(4))
        found = model(states, token)
        assert not bool(found.adjacency[:-1, ..., N].any())
        assert bool(found.adjacency[-1, :, :N, N].any())
        assert torch.equal(found.graph().targets, found.graph().direct)
        # LayerNorm takes away what is the same in all features; a perceptron would not.
        torch.testing.assert_close(model(states, token + 1).states, found.states)


@torch.no_grad()
def test_as_published_the_token_goes_through_all_layers() -> None:
    model = make(replace(CONFIG, token_reads=True))
    states, environment = draw()
    adjacency = model(states, environment).adjacency
    assert bool(adjacency[0, :, :N, N].any())
    assert bool(adjacency[:, :, N, :N].any())


def test_the_token_of_no_intervention_stays_zero() -> None:
    for make_model in (TransitionModel, lambda config: GlobalGraph(config, N)):
        model = make_model(CONFIG)
        states, environment = draw()
        model(states, environment).states.sum().backward()
        assert model.codebook.grad is not None
        assert model.codebook.grad.any(-1).tolist() == [False, True]


@torch.no_grad()
def test_softness_opens_gates_to_the_token_by_halves() -> None:
    model = make()
    states, environment = draw()
    environment = torch.ones_like(environment)
    first = model(states, environment, softness=1e6)
    torch.testing.assert_close(
        first.probability[0, :, :N, N], torch.full((B, N), 0.5), rtol=0, atol=1e-4
    )
    usual = model(states, environment)
    assert torch.equal(first.probability[0, ..., :N], usual.probability[0, ..., :N])


@torch.no_grad()
def test_global_graph_reads_only_what_is_open() -> None:
    torch.manual_seed(0)
    model = GlobalGraph(CONFIG, N).eval()
    model.gate_logits.data = torch.randn(N, N + 1)
    states, environment = draw()
    before = model(states, environment)
    for j in range(N):
        moved = (model(other_object(states, j), environment).states != before.states).any(-1)
        reads = (model.gate_logits[:, j] > 0) | (torch.arange(N) == j)
        assert torch.equal(moved, reads.expand(B, -1))


@torch.no_grad()
def test_nearest_objects_reads_its_neighbour() -> None:
    torch.manual_seed(0)
    model = NearestObjects(replace(CONFIG, mode="dense")).eval()
    states, environment = draw()
    edges = model(states, environment).graph().edges
    distance = torch.cdist(states[..., :2], states[..., :2])
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    assert torch.equal(edges, distance == distance.amin(-1, keepdim=True))


@pytest.mark.parametrize(
    "make_model",
    [
        lambda: TransitionModel(CONFIG),
        lambda: GlobalGraph(CONFIG, N),
        lambda: NearestObjects(replace(CONFIG, mode="dense"), 2),
    ],
)
def test_files(make_model: type, tmp_path: Path) -> None:
    model: WorldModel = make_model()
    save_model(tmp_path / "model.safetensors", model)
    found = load_model(tmp_path / "model.safetensors")
    assert type(found) is type(model)
    assert found.config == model.config
    states, environment = draw()
    expected = model.eval()(states, environment).states
    assert torch.equal(found(states, environment).states, expected)


def test_other_files_are_refused(tmp_path: Path) -> None:
    from spartan.files import save_tensors

    path = tmp_path / "other.safetensors"
    save_tensors(path, {"x": torch.zeros(1)}, {"config": {}})
    with pytest.raises(FileError, match="does not hold a world model"):
        load_model(path)


@pytest.mark.parametrize(
    "change",
    [
        {"features": 0},
        {"changing": 6},
        {"layers": 0},
        {"mode": "sparce"},
        {"normalise": "none"},
        {"gate_scale": "d"},
        {"token_layers": "first"},
        {"token_layers": "last", "token_reads": True},
    ],
)
def test_settings_out_of_range(change: dict[str, object]) -> None:
    with pytest.raises(WorldError):
        replace(CONFIG, **change)  # type: ignore[arg-type]


def test_inputs_that_do_not_fit() -> None:
    model = make()
    states, environment = draw()
    for wrong in (
        (states[..., :3], environment),
        (states, environment[:3]),
        (states, torch.zeros(7)),
        (states, environment, torch.ones(B, N)),
        (states, environment, torch.ones(B, 2, dtype=torch.bool)),
    ):
        with pytest.raises(WorldError):
            model(*wrong)
