"""Methods that solve one layer: what they promise about masks and errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spartan.post_training import ALPS, OBS, MagnitudeSolver, SparseGPT, Wanda
from spartan.post_training.grams import LayerProblem
from spartan.post_training.least_squares import refit, unconstrained
from spartan.post_training.obs import removal_order, units_to_keep
from spartan.weights.patterns import NM, Block, Unstructured
from tests.post_training.problems import make_problem, squared_error

METHODS = [MagnitudeSolver(), Wanda(), SparseGPT(), SparseGPT(block=4), OBS(), ALPS()]
PATTERNS = [Unstructured(), Block(4, 1), Block(1, 4), Block(2, 3), Block(4, 4), NM(2, 4), NM(1, 3)]

method_param = pytest.mark.parametrize("method", METHODS, ids=repr)
pattern_param = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


@method_param
@pattern_param
@pytest.mark.parametrize("groups", [1, 2])
def test_exactly_so_many_units_stay(method, pattern, groups: int) -> None:
    problem, *_ = make_problem(8, 12, pattern, shift=0.3, groups=groups)
    for kept in {1, problem.tiling.count // 3, problem.tiling.count - 1}:
        units = method.prune(problem, kept).units
        assert units.shape == problem.tiling.units
        if isinstance(pattern, NM):
            assert (units.view(-1, pattern.m).sum(dim=1) == pattern.n).all()
        else:
            assert int(units.sum()) == kept


@method_param
def test_keeping_everything_of_dense_inputs_changes_nothing(method) -> None:
    problem, *_ = make_problem()
    solution = method.prune(problem, problem.tiling.count)
    assert solution.units.all()
    torch.testing.assert_close(solution.matrix, problem.dense)


@given(
    seed=st.integers(0, 10_000),
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 10),
    kept=st.floats(0, 1),
    shift=st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=60, deadline=None)
def test_the_refit_is_the_least_squares_solution(
    seed: int, outputs: int, inputs: int, kept: float, shift: float
) -> None:
    problem, dense, pruned = make_problem(outputs, inputs, damping=1e-9, shift=shift, seed=seed)
    mask = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) < kept
    ours = refit(problem, mask)
    assert (ours[~mask] == 0).all()
    # What defines it is held, not the solution: where inputs nearly depend on each other, another
    # one is as good.
    for row in range(outputs):
        m, w = mask[row], problem.dense[row]
        x, answer = pruned[0][m], ours[row][m]
        # Half the gradient of |w X0 - a X|² + r |a - w|², each sum beside its absolute products.
        slope = (answer @ x - w @ dense[0]) @ x.T + problem.ridge[0] * (answer - w[m])
        magnitude = (answer.abs() @ x.abs() + w.abs() @ dense[0].abs()) @ x.abs().T
        assert bool((slope.abs() <= 1e-10 * magnitude).all())


def test_the_refit_beats_gradient_descent_on_the_same_mask() -> None:
    problem, dense, pruned = make_problem(8, 24, shift=0.3, damping=1e-9)
    mask = MagnitudeSolver().prune(problem, problem.tiling.count // 3).units
    exact = squared_error(problem, refit(problem, mask), dense, pruned)
    weight = (problem.dense * mask).clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.01)
    for _ in range(500):
        optimizer.zero_grad()
        loss = (problem.dense @ dense[0] - (weight * mask) @ pruned[0]).square().sum()
        loss.backward()
        optimizer.step()
        assert exact <= loss.item() * (1 + 1e-9)
    assert loss.item() < 1.5 * exact  # it is the same problem


def test_the_error_is_that_of_the_outputs() -> None:
    problem, dense, pruned = make_problem(shift=0.4, groups=2)
    matrix = refit(problem, problem.dense.abs() > 0.5)
    wanted = squared_error(problem, torch.zeros_like(matrix), dense, pruned)
    ours = squared_error(problem, matrix, dense, pruned)
    assert problem.error(matrix) == pytest.approx(ours / wanted, rel=1e-6)
    assert problem.error(problem.dense * 0) == pytest.approx(1.0)


def test_with_dense_inputs_and_everything_kept_the_weights_return() -> None:
    problem, *_ = make_problem()
    torch.testing.assert_close(unconstrained(problem), problem.dense)
    torch.testing.assert_close(
        refit(problem, torch.ones_like(problem.dense, dtype=torch.bool)), problem.dense
    )


def test_dead_inputs_and_too_few_samples_do_not_break_the_solution() -> None:
    problem, *_ = make_problem(damping=1e-2)
    problem.gram.hessian[:, 3] = problem.gram.hessian[:, :, 3] = 0  # an input that is always 0
    problem.gram.cross[:, 3] = problem.gram.cross[:, :, 3] = 0
    for method in METHODS:
        solution = method.prune(problem, 30)
        assert solution.matrix.isfinite().all()
        assert int(solution.units.sum()) == 30
    problem.gram.hessian.zero_()
    problem.gram.cross.zero_()
    problem.__post_init__()
    mask = torch.rand_like(problem.dense) < 0.5
    torch.testing.assert_close(refit(problem, mask), problem.dense * mask)


# Optimal brain surgeon --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", [Unstructured(), Block(2, 1), Block(1, 3), Block(4, 2)], ids=str
)
@pytest.mark.parametrize("inputs", [6, 12])
def test_costs_of_a_trace_add_up_to_the_outputs(pattern, inputs: int) -> None:
    problem, dense, pruned = make_problem(8, inputs, pattern, damping=1e-10, shift=0.3)
    found = removal_order(problem)
    start = squared_error(problem, unconstrained(problem), dense, pruned)
    total = float(found.costs.sum())
    assert start + total == pytest.approx(float(problem.gram.target.sum()), rel=1e-6)
    assert (found.order.sort(dim=1).values == torch.arange(problem.tiling.units[1])).all()


@pytest.mark.parametrize("pattern", [Unstructured(), Block(2, 1), Block(1, 3)], ids=str)
def test_every_removal_costs_what_the_trace_says(pattern) -> None:
    problem, dense, pruned = make_problem(4, 9, pattern, damping=1e-10, shift=0.3)
    found = removal_order(problem)
    before = squared_error(problem, unconstrained(problem), dense, pruned)
    units = torch.ones(problem.tiling.units, dtype=torch.bool)
    for step in range(found.order.shape[1] - 1):
        band = torch.arange(len(units))
        units[band, found.order[:, step]] = False
        matrix = refit(problem, problem.tiling.spread(units))
        after = squared_error(problem, matrix, dense, pruned)
        assert after - before == pytest.approx(
            float(found.costs[:, step].sum()), rel=1e-5, abs=1e-9 * after
        )
        before = after


def test_each_removal_is_the_cheapest() -> None:
    problem, dense, pruned = make_problem(1, 7, damping=1e-10)
    found = removal_order(problem)
    mask = torch.ones(1, 7, dtype=torch.bool)
    for step in range(6):
        errors = {}
        for i in range(7):
            if mask[0, i]:
                without = mask.clone()
                without[0, i] = False
                errors[i] = squared_error(problem, refit(problem, without), dense, pruned)
        assert min(errors, key=errors.__getitem__) == int(found.order[0, step])
        mask[0, found.order[0, step]] = False


def test_masks_of_a_trace_are_nested_and_cut_at_one_height() -> None:
    problem, *_ = make_problem(6, 10)
    found = removal_order(problem)
    before = torch.zeros(6, 10, dtype=torch.bool)
    for kept in range(1, 61):
        units = units_to_keep(found, kept, problem.tiling)
        assert int(units.sum()) == kept
        assert (units | before).equal(units)
        before = units


def test_obs_is_not_worse_than_the_others_and_near_the_best_mask() -> None:
    for seed in range(5):
        problem, dense, pruned = make_problem(1, 9, damping=1e-9, shift=0.2, seed=seed)
        errors = {}
        for method in METHODS:
            mask = method.prune(problem, 4).units
            errors[method.name] = squared_error(problem, refit(problem, mask), dense, pruned)
        best = min(
            squared_error(problem, refit(problem, mask), dense, pruned)
            for chosen in itertools.combinations(range(9), 4)
            if (mask := torch.zeros(1, 9, dtype=torch.bool)).index_fill_(
                1, torch.tensor(chosen), True
            )
            is not None
        )
        assert errors["obs"] <= min(errors.values()) * 1.2
        assert best <= errors["obs"] <= 1.5 * best
        assert errors["alps"] <= 1.5 * best


# The others -------------------------------------------------------------------------------------


def test_wanda_compares_within_each_output() -> None:
    problem, *_ = make_problem(8, 12)
    units = Wanda().prune(problem, 8 * 5 + 3).units
    assert units.sum(dim=1).tolist() == [6] * 3 + [5] * 5
    norms = problem.gram.hessian[0].diagonal().sqrt()
    scores = problem.dense.abs() * norms
    for row, kept in zip(scores, units, strict=True):
        assert row[kept].min() >= row[~kept].max()


def test_sparsegpt_updates_help() -> None:
    problem, dense, pruned = make_problem(16, 48, shift=0.2, damping=1e-4)
    solution = SparseGPT(block=8).prune(problem, problem.tiling.count // 2)
    with_updates = squared_error(problem, solution.matrix * solution.units, dense, pruned)
    without = squared_error(problem, problem.dense * solution.units, dense, pruned)
    assert with_updates < 0.7 * without


def test_alps_finds_better_masks_than_one_sweep() -> None:
    problem, dense, pruned = make_problem(24, 64, damping=1e-4)
    for kept in (200, 500, 1000):
        errors = {
            method.name: squared_error(
                problem, refit(problem, method.prune(problem, kept).units), dense, pruned
            )
            for method in (ALPS(), SparseGPT(block=8), Wanda())
        }
        assert errors["alps"] < min(errors["sparsegpt"], errors["wanda"])


def test_a_change_earns_its_place_on_samples_held_out() -> None:
    """The share that is taken is the best of all, and what fits the noise only takes none."""
    problem, *_ = make_problem(6, 10, shift=0.3)
    other, *_ = make_problem(6, 10, shift=0.3, seed=1)
    change = unconstrained(problem) - problem.dense
    problem.held_out = other.gram

    def held_out_error(share: float) -> float:
        w, gram = problem.grouped(problem.dense + share * change), other.gram
        aim = problem.grouped(problem.dense) @ gram.cross
        return float((w @ gram.hessian * w).sum() - 2 * (aim * w).sum())

    share = problem.earned(problem.dense, change)
    assert 0 <= share <= 1
    tried = [held_out_error(i / 50) for i in range(51)]
    assert held_out_error(share) <= min(tried) + 1e-9 * abs(min(tried))
    assert problem.earned(problem.dense, -1e-3 * change) == (0.0 if share > 0 else 1.0)
    again = LayerProblem(
        problem.weight, problem.tiling, problem.dense, problem.gram, problem.damping, other.gram
    )
    assert again.share == pytest.approx(share, rel=1e-9)
    torch.testing.assert_close(unconstrained(again), problem.dense + share * change)
    problem.held_out = None
    assert problem.earned(problem.dense, change) == 1.0
