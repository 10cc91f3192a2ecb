"""The table of ways to train: each ends exact, refused or told, under every kind of method.

exact    the model holds the budget, every training step was counted, and nothing was said
told     the same, and one warning said what happened
refused  an exception said what to do instead, before harm was done
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from spartan.errors import SpartanError
from tests.sparsifier import loops
from tests.sparsifier.loops import METHODS, Loop, Training, budget_of

# Short runs of small networks: layers may lose much, gates do not arrive.
SIZE = ("Next to nothing", "Nothing is kept", "gates", "Gates")


class Row(NamedTuple):
    """How a loop ends with methods that mask, and with one that grows, and what is said."""

    masking: str
    growing: str
    says: str = ""


ROWS: dict[Loop, Row] = {
    loops.plain: Row("exact", "exact"),
    loops.every_optimizer: Row("exact", "exact"),
    loops.accumulation_and_clipping: Row("exact", "exact"),
    loops.clipping_by_value: Row("exact", "exact"),
    loops.closures: Row("exact", "exact"),
    loops.lbfgs: Row("exact", "refused", "LBFGS keeps a history"),
    loops.grad_scaler: Row("exact", "exact"),
    loops.everything_of_it_in_bfloat16: Row("exact", "exact"),
    loops.compiled: Row("exact", "exact"),
    # Others look at the model, or copy it
    loops.saving_in_a_hook_before_ours: Row("exact", "exact"),
    loops.looking_in_hooks_after_ours: Row("exact", "exact"),
    loops.model_run_inside_of_a_step: Row("exact", "exact"),
    loops.copies_along_the_way: Row("exact", "exact"),
    loops.average_in_a_hook: Row("exact", "refused", "values of different connections"),
    # Others write into it
    loops.average_copied_into_the_model: Row("exact", "refused", "different connections"),
    loops.best_weights_loaded: Row("exact", "exact"),
    loops.written_after_the_last_step: Row("refused", "exact", "finalize(keep='model')"),
    loops.clipped_through_data: Row("told", "told", "written outside the optimizer"),
    loops.float32_masters: Row("refused", "told", "finalize(keep='model')|backward passes"),
    # Optimizers around optimizers, others, anew
    loops.handle_of_a_trainer: Row("exact", "exact"),
    loops.lookahead_given: Row("exact", "refused", "cannot follow connections"),
    loops.lookahead_around_the_given_one: Row("exact", "refused", "cannot follow connections"),
    loops.lookahead_found: Row("exact", "refused", "cannot follow connections"),
    loops.schedule_free: Row("exact", "exact"),
    loops.optimizer_made_anew: Row("told", "told", "it takes its place"),
    loops.unknown_optimizer_of_one_layer: Row("refused", "refused", "was not given"),
    loops.two_optimizers_given: Row("exact", "exact"),
    loops.two_optimizers_found: Row("exact", "exact"),
    loops.unequal_turns: Row("refused", "refused", "stepped a second time"),
    loops.optimizer_in_backward: Row("refused", "refused", "inside a backward pass"),
    # Parameters exchanged, steps too many or hidden, resuming
    loops.exchanged_head: Row("refused", "refused", "in the place of '3."),
    loops.assigned_state: Row("refused", "refused", "in the place of '0."),
    loops.surplus_steps: Row("told", "told", "the masks stay"),
    loops.finalized_twice: Row("exact", "exact"),
    loops.trained_after_the_end: Row("refused", "exact", "trained or written since"),
    loops.states_filled_by_hidden_steps: Row("exact", "exact"),
    loops.resumed: Row("exact", "exact"),
    loops.resumed_from_a_distributed_checkpoint: Row("exact", "exact"),
    # Gradients that are not those of the step
    loops.another_gradient_before: Row("exact", "exact"),
    loops.gradients_set_by_hand: Row("exact", "refused", "set by hand"),
}
# SAM's perturbed weights are written between the passes: methods that show samples then notice.
ROW_OF_GATES = {loops.sam_in_two_calls: Row("told", "", "written outside the optimizer")}
ROWS[loops.sam_in_two_calls] = Row("exact", "exact")


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loop", ROWS, ids=lambda loop: loop.__name__)
def test_a_loop_ends_exact_refused_or_told(loop: Loop, method: str, tmp_path: Path) -> None:
    training = Training(method, tmp_path)
    row = ROW_OF_GATES.get(loop, ROWS[loop]) if method == "gates" else ROWS[loop]
    wanted = row.growing if training.grows else row.masking
    before = [p.detach().clone() for p in training.model.parameters()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loop(training)
            training.sparsifier.finalize()
            outcome, said = "exact", ""
        except SpartanError as error:
            outcome, said = "refused", str(error)
    texts = [str(w.message) for w in caught if is_ours(str(w.message))]
    if outcome == "exact" and texts:
        outcome, said = "told", " ".join(texts)
    assert outcome == wanted, said
    if outcome != "exact":
        assert any(words in said for words in row.says.split("|"))
    if outcome != "refused":
        after = list(training.model.parameters())
        assert training.kept() == budget_of(training)
        assert not all(map(torch.equal, before, after))
        counted = 0 if "no step is counted" in said else training.taken
        assert training.sparsifier.step == counted


def is_ours(message: str) -> bool:
    """Whether a warning is about the loop, and not about the size of the network, or torch's."""
    known = ("sparsifier", "the masks stay", "no step is counted", "takes its place", "optimizer")
    return any(w in message for w in known) and not any(w in message for w in SIZE)
