"""World models that learn which object influences which, in each state.

A transformer over object tokens whose attention passes through hard, learned gates that depend on
the state. The paths through the gates are as few as an error budget allows, or the error is as
small as an edge budget allows; where there is no path, there is no influence, as long as the gates
stay as they are.

    model = TransitionModel(TransitionConfig(features=9, changing=4, environments=5))
    model.fit_scale(data)
    learner = Learner(model, data, held_out, Recipe(steps=16_000), ErrorBudget(0.06))
    while not learner.done:
        learner.advance()
        if learner.checks_now:
            learner.check()
    learner.finish()
    graph = model(states, environment).graph()

Source: Lei, Schölkopf, Posner, "SPARTAN: A Sparse Transformer World Model Attending to What
Matters", NeurIPS 2025 (arXiv 2411.06890).
"""

from spartan.world_model.adaptation import Adaptation, adapt
from spartan.world_model.attention import GatedAttention
from spartan.world_model.baselines import GlobalGraph, NearestObjects, constant_graph
from spartan.world_model.constraints import EdgeBudget, ErrorBudget
from spartan.world_model.elimination import eliminate
from spartan.world_model.files import load_model, save_model
from spartan.world_model.learning import Learner, Recipe, measure
from spartan.world_model.metrics import (
    GraphScores,
    found_graphs,
    influence_without_path,
    oracle_threshold,
    removal_error_change,
    rollout,
    rollout_error,
    score_graphs,
    thresholded_graphs,
)
from spartan.world_model.model import Prediction, TransitionConfig, TransitionModel, WorldModel
from spartan.world_model.paths import Graph, count_paths, path_matrix, reachable, read_graph
from spartan.world_model.refining import Refiner
from spartan.world_model.transitions import Transitions

__all__ = [
    "Adaptation",
    "EdgeBudget",
    "ErrorBudget",
    "GatedAttention",
    "GlobalGraph",
    "Graph",
    "GraphScores",
    "Learner",
    "NearestObjects",
    "Prediction",
    "Recipe",
    "Refiner",
    "TransitionConfig",
    "TransitionModel",
    "Transitions",
    "WorldModel",
    "adapt",
    "constant_graph",
    "count_paths",
    "eliminate",
    "found_graphs",
    "influence_without_path",
    "load_model",
    "measure",
    "oracle_threshold",
    "path_matrix",
    "reachable",
    "read_graph",
    "removal_error_change",
    "rollout",
    "rollout_error",
    "save_model",
    "score_graphs",
    "thresholded_graphs",
]
