"""Training under a budget, on a world that is learned in seconds."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from spartan.errors import NonFiniteError, WorldError
from spartan.files import load_state, save_state
from spartan.world_model import (
    EdgeBudget,
    ErrorBudget,
    GlobalGraph,
    Learner,
    Recipe,
    TransitionConfig,
    TransitionModel,
    Transitions,
    WorldModel,
    adapt,
    constant_graph,
    found_graphs,
    influence_without_path,
    measure,
    oracle_threshold,
    removal_error_change,
    rollout_error,
    score_graphs,
    thresholded_graphs,
)
from spartan.world_model.adaptation import compose
from spartan.world_model.constraints import Constraint
from spartan.world_model.learning import meet_edges, prediction_error
from tests.world_model.worlds import CONFIG, follower_world, make_model, train

DENSE_RECIPE = Recipe(steps=600, lr=3e-3)
RECIPE = Recipe(steps=1200, lr=3e-3, checks=12)
EDGES_RECIPE = Recipe(steps=3000, lr=1.5e-3)  # budgets of edges need slower steps


@pytest.fixture(scope="module")
def data() -> Transitions:
    return follower_world(20_000)


@pytest.fixture(scope="module")
def held_out() -> Transitions:
    return follower_world(2_000, seed=1)


@pytest.fixture(scope="module")
def dense(data: Transitions, held_out: Transitions) -> WorldModel:
    return train(Learner(make_model(data, mode="dense"), data, held_out, DENSE_RECIPE))


def sparse_from(
    dense: WorldModel,
    data: Transitions,
    held_out: Transitions,
    budget: ErrorBudget | EdgeBudget,
    recipe: Recipe,
) -> WorldModel:
    model = make_model(data)
    model.load_state_dict(dense.state_dict())
    return train(Learner(model, data, held_out, recipe, budget))


@pytest.fixture(scope="module")
def by_error(dense: WorldModel, data: Transitions, held_out: Transitions) -> WorldModel:
    return sparse_from(dense, data, held_out, ErrorBudget(0.1), RECIPE)


@pytest.fixture(scope="module")
def by_edges(dense: WorldModel, data: Transitions, held_out: Transitions) -> WorldModel:
    return sparse_from(dense, data, held_out, EdgeBudget(0.41), EDGES_RECIPE)


def test_an_error_budget_is_kept_and_finds_the_graph(
    by_error: WorldModel, held_out: Transitions
) -> None:
    error, edges = measure(by_error, held_out)
    scores = score_graphs(found_graphs(by_error, held_out), held_out)
    assert error <= 0.1
    assert edges == pytest.approx(scores.edges)
    assert scores.recall > 0.8
    assert 3 * scores.shd < scores.true_edges  # of the empty graph


def test_targets_of_the_intervention_are_found(by_error: WorldModel, held_out: Transitions) -> None:
    assert held_out.targets is not None
    direct = found_graphs(by_error, held_out, direct=True)[..., -1]
    reached = found_graphs(by_error, held_out)[..., -1]
    assert (direct & held_out.targets).sum() / held_out.targets.sum() >= 0.95
    assert not (direct & ~reached).any()
    assert (reached & held_out.targets).sum() / held_out.targets.sum() >= 0.95
    # The price of a path may not have closed every gate that is of no use yet…
    assert (direct & held_out.targets).sum() / direct.sum() >= 0.8
    # …but no object needs to read that the intervention is not about it.
    with torch.no_grad():
        adjacency = by_error(held_out.states, held_out.environment).adjacency
        adjacency[:, :, :-1, -1] *= held_out.targets
        said = by_error(held_out.states, held_out.environment, adjacency=adjacency).states
    error = prediction_error(said, held_out, by_error.scale)
    assert float(error) < 1.05 * measure(by_error, held_out)[0]


def test_a_model_that_is_not_finite_is_not_remembered(data: Transitions) -> None:
    learner = Learner(make_model(data), data, data, Recipe(steps=5), ErrorBudget(0.01))
    next(learner.model.parameters()).data.fill_(torch.nan)
    learner.check()
    assert learner.best is None


def test_an_edge_budget_is_kept_exactly_and_finds_the_graph(
    by_edges: WorldModel, held_out: Transitions
) -> None:
    error, edges = measure(by_edges, held_out)
    assert edges <= 0.41
    assert edges * len(held_out) == pytest.approx(0.41 * len(held_out), abs=1)
    assert error < 0.1
    scores = score_graphs(found_graphs(by_edges, held_out), held_out)
    assert scores.precision > 0.9
    assert scores.recall > 0.9
    assert 3 * scores.shd < scores.true_edges  # of the empty graph


def test_without_a_path_nothing_moves(by_edges: WorldModel, held_out: Transitions) -> None:
    generator = torch.Generator().manual_seed(0)
    held, free = influence_without_path(by_edges, held_out, generator)  # type: ignore[arg-type]
    assert held == 0
    assert 0 < free < 1
    graphs = found_graphs(by_edges, held_out)
    assert abs(removal_error_change(by_edges, held_out, graphs)) < 1e-6
    nothing = torch.zeros_like(graphs)
    assert removal_error_change(by_edges, held_out, nothing) > 1


@pytest.mark.parametrize("budget", [ErrorBudget(0.3), EdgeBudget(0.5), None])
def test_resuming_is_exact(
    budget: ErrorBudget | EdgeBudget | None,
    data: Transitions,
    held_out: Transitions,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    recipe = Recipe(steps=60, checks=6)
    whole = Learner(make_model(data), data, held_out, recipe, budget)
    half = Learner(make_model(data), data, held_out, recipe, budget)
    for _ in range(25):
        half.advance()
        if half.checks_now:
            half.check()
    path = tmp_path_factory.mktemp("run") / "state.safetensors"
    save_state(path, half.state_dict())
    rest = Learner(make_model(data), data, held_out, recipe, budget)
    rest.load_state_dict(load_state(path))
    assert rest.step == 25
    expected, found = train(whole).state_dict(), train(rest).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    if whole.constraint is not None and rest.constraint is not None:
        assert whole.constraint.state_dict() == rest.constraint.state_dict()


def test_a_target_that_the_empty_graph_meets_is_refused() -> None:
    ErrorBudget(0.3).check(0.9)
    with pytest.raises(WorldError, match=r"0\.95.*0\.9.*empty graph"):
        ErrorBudget(0.95).check(0.9)


def test_an_edge_budget_shrinks_from_all_edges() -> None:
    constraint = Constraint(EdgeBudget(2.0), objects=4)
    limits = [constraint.limit_at(p / 10) for p in range(11)]
    assert limits[0] == limits[1] == 12
    assert limits[6:] == [2.0] * 5
    assert limits == sorted(limits, reverse=True)


def test_the_budgets_push_from_their_own_side() -> None:
    prediction = make_model(follower_world(8))(torch.randn(8, 2, 3), torch.zeros(8).long())
    many = torch.ones_like(prediction.adjacency)
    for budget in (ErrorBudget(0.1), EdgeBudget(0.1)):
        constraint = Constraint(budget, objects=2)
        constraint.presses = True
        weights = [
            constraint.loss(torch.tensor(0.01), 0.01, many, progress=1.0)[1]["path_weight"]
            for _ in range(3)
        ]
        # Below the error that is allowed, or above the edges: paths get dearer.
        assert weights == sorted(weights)
        assert weights[0] < weights[2]


def test_paths_cost_nothing_at_first() -> None:
    prediction = make_model(follower_world(8))(torch.randn(8, 2, 3), torch.zeros(8).long())
    constraint = Constraint(ErrorBudget(0.1), objects=2)
    gates, error = prediction.adjacency, torch.tensor(0.1)
    assert constraint.loss(error, 0.5, gates, 0.5)[1]["path_weight"] == 0
    for _ in range(300):
        constraint.loss(error, 0.15, gates, 0.5)
    assert constraint.loss(error, 0.15, gates, 0.5)[1]["path_weight"] > 0
    by_edges = Constraint(EdgeBudget(0.1), objects=2)
    assert by_edges.loss(error, 0.15, gates, 0.1)[1]["path_weight"] == 0
    by_edges.loss(error, 0.15, gates, 0.2)
    assert by_edges.loss(error, 0.15, gates, 0.21)[1]["path_weight"] > 0


def test_adapting_touches_only_the_token(by_edges: WorldModel) -> None:
    unseen = follower_world(60, seed=3, environments=1)
    unseen = dataclasses.replace(unseen, following=unseen.following.clone())
    unseen.following[:, 0] += 1.5  # 1 was seen in training
    weights = copy.deepcopy(by_edges.state_dict())
    by_edges.zero_grad()
    found = adapt(by_edges, unseen, steps=100)  # type: ignore[arg-type]
    assert found.token.shape == (CONFIG.width,)
    assert all(torch.equal(weights[name], value) for name, value in by_edges.state_dict().items())
    assert all(p.grad is None for p in by_edges.parameters())
    best = min(_error(by_edges, unseen, token) for token in weights["codebook"])
    assert found.error == pytest.approx(_error(by_edges, unseen, found.token), rel=1e-4)
    assert found.error < 0.5 * best


def _error(model: WorldModel, data: Transitions, token: torch.Tensor) -> float:
    with torch.no_grad():
        predicted = model(data.states, token, data.mask).states
    return float(((predicted - data.following) / model.scale).square().mean())


@torch.no_grad()
def test_tokens_that_suit_one_object_each_are_added() -> None:
    torch.manual_seed(0)
    model = TransitionModel(TransitionConfig(features=3, changing=2, environments=4, mode="dense"))
    states = torch.randn(50, 4, 3)
    with_token = torch.stack([model(states, token).states for token in model.codebook])
    suits = torch.tensor([1, 3, 0, 3])
    following = with_token[suits, :, torch.arange(4)].transpose(0, 1)
    data = Transitions(
        states, following, torch.ones(50, 4, dtype=torch.bool), torch.zeros(50).long()
    )
    assert torch.equal(compose(model, data), model.codebook[1] + model.codebook[3])


def test_adapting_refuses_what_does_not_fit(by_edges: WorldModel) -> None:
    data = follower_world(4)
    wide = dataclasses.replace(data, following=torch.zeros(4, 2, 2))
    for arguments, words in (((wide,), "features that change"), ((data, 0), "must be positive")):
        with pytest.raises(WorldError, match=words):
            adapt(by_edges, *arguments)  # type: ignore[arg-type]


def test_baselines_learn(dense: WorldModel, data: Transitions, held_out: Transitions) -> None:
    identity = train(
        Learner(make_model(data, mode="identity"), data, held_out, Recipe(steps=100, lr=3e-3))
    )
    torch.manual_seed(0)
    one = GlobalGraph(CONFIG, 2)
    one.fit_scale(data)
    recipe = Recipe(steps=600, lr=3e-3, checks=6)  # one gate is to be learned
    train(Learner(one, data, held_out, recipe, ErrorBudget(0.2)))
    assert measure(dense, held_out)[0] < 0.1 < 0.5 < measure(identity, held_out)[0]
    assert measure(one, held_out)[0] <= 0.2
    # One graph for all states has the one edge always.
    assert found_graphs(one, held_out)[:, 1, 0].all()
    assert score_graphs(found_graphs(one, held_out), held_out).recall == 1
    best = oracle_threshold(dense, held_out)
    shd = score_graphs(thresholded_graphs(dense, held_out, best), held_out).shd
    assert shd <= score_graphs(thresholded_graphs(dense, held_out, 0.5), held_out).shd
    assert not constant_graph(held_out)[:, :2].any()  # the edge is there in 41 % of states


def test_scores_by_hand() -> None:
    data = follower_world(4)
    assert data.edges is not None
    assert data.targets is not None
    edges = torch.tensor([1, 1, 0, 0]).bool()
    truth = dataclasses.replace(
        data,
        edges=torch.zeros(4, 2, 2, dtype=torch.bool),
        targets=torch.zeros(4, 2, dtype=torch.bool),
    )
    assert truth.edges is not None
    truth.edges[:, 1, 0] = edges
    found = torch.zeros(4, 2, 3, dtype=torch.bool)
    found[:, 1, 0] = torch.tensor([1, 0, 1, 1]).bool()
    found[:, 0, 0] = True  # the diagonal does not count
    found[0, 0, 2] = True  # a wrong target
    scores = score_graphs(found, truth)
    assert scores.shd == 3 / 4
    assert scores.shd_with_targets == 4 / 4
    assert (scores.precision, scores.recall) == (1 / 3, 1 / 2)
    assert (scores.event_precision, scores.event_recall) == (1.0, 1 / 2)
    assert scores.clear_shd is None
    borderline = torch.zeros(4, 2, 2, dtype=torch.bool)
    borderline[0, 1, 0] = borderline[2, 1, 0] = True  # the second of them is wrong
    clear = score_graphs(found, dataclasses.replace(truth, borderline=borderline))
    assert (clear.shd, clear.clear_shd) == (3 / 4, 2 / 4)


def test_rollouts_of_one_step_are_predictions(by_edges: WorldModel) -> None:
    data = follower_world(10)
    with torch.no_grad():
        predicted = by_edges(data.states, data.environment, data.mask).states
    expected = float((predicted - data.following).norm(dim=-1).mean())
    assert rollout_error(by_edges, data, 1) == pytest.approx(expected, rel=1e-5)


def test_bad_input(data: Transitions) -> None:
    for broken in (
        {"following": data.following[:, :1]},
        {"mask": torch.zeros_like(data.mask)},
        {"environment": data.environment - 1},
        {"environment": data.environment.float()},
    ):
        with pytest.raises(WorldError):
            dataclasses.replace(data, **broken)  # type: ignore[arg-type]
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(WorldError, match="needed"):
            ErrorBudget(wrong)
        with pytest.raises(WorldError, match="needed"):
            EdgeBudget(wrong)
    for change in ({"steps": 0}, {"lr": 0.0}, {"sharpness": 0.5}, {"checks": 0}, {"severed": 1.0}):
        with pytest.raises(WorldError):
            Recipe(**change)  # type: ignore[arg-type]
    other = dataclasses.replace(data, environment=data.environment + 5)
    with pytest.raises(WorldError, match="environments"):
        Learner(make_model(data), other, data, RECIPE)
    with pytest.raises(WorldError, match="NaN"):
        dataclasses.replace(data, states=data.states * torch.nan)
    with pytest.raises(WorldError, match="mask begins with"):
        dataclasses.replace(data, mask=data.mask[:3])
    without = dataclasses.replace(data, edges=None)
    with pytest.raises(WorldError, match="true graphs"):
        constant_graph(without)


def test_more_edges_than_there_are_open_all_gates(held_out: Transitions) -> None:
    model = make_model(held_out)
    meet_edges(model, held_out, 2.0)
    assert measure(model, held_out)[1] == 2.0
    meet_edges(model, held_out, 0.001)
    assert measure(model, held_out)[1] <= 0.001


def test_an_empty_graph_far_from_its_error_is_told(data: Transitions) -> None:
    learner = Learner(make_model(data), data, data, Recipe(steps=5), ErrorBudget(0.01))
    for block in learner.model.blocks:  # type: ignore[union-attr]
        block.attention.gate_bias = -1e4  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="No edge is left.*0.01 is allowed"):
        train(learner)


def test_models_without_gates_have_no_budget(data: Transitions) -> None:
    with pytest.raises(WorldError, match="has no gates"):
        Learner(make_model(data, mode="dense"), data, data, RECIPE, EdgeBudget(1.0))


def test_the_published_settings_learn(data: Transitions, held_out: Transitions) -> None:
    model = make_model(data, normalise="dense", gate_scale="none", token_reads=True)
    recipe = Recipe(steps=200, lr=3e-3)
    learner = Learner(model, data, held_out, recipe, ErrorBudget(0.3), rows="all")
    errors = torch.tensor([learner.advance()["error"] for _ in range(200)])
    assert errors[-20:].mean() < 0.8 * errors[:20].mean()
    assert model(held_out.states, held_out.environment).adjacency[:, :, -1].any()


def test_a_loss_that_diverges_is_told(data: Transitions) -> None:
    model = make_model(data)
    model.decoder.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="lower lr"):
        Learner(model, data, data, RECIPE).advance()
