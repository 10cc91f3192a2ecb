"""Names that users import: those of today, and those of version 0.1."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import spartan
from spartan import old_names

# What `spartan.__all__` held in version 0.1.
NAMES_OF_0_1 = {
    "NM", "Block", "Budget", "Channel", "CompressionReport", "Sparsifier", "SpartanError",
    "Unstructured", "accelerate", "adapters", "always_sparse", "compress", "freeze", "hard_topk",
    "kernels", "load", "methods", "post_training", "purge", "save", "soft_topk",
}  # fmt: skip


def test_no_name_was_lost() -> None:
    assert set(spartan.__all__) >= NAMES_OF_0_1
    assert all(hasattr(spartan, name) for name in spartan.__all__)


def test_the_world_model_is_there_when_it_is_asked_for() -> None:
    code = (
        "import sys, spartan\n"
        "assert 'spartan.world_model' not in sys.modules\n"
        "assert spartan.world_model.WorldModel.__module__ == 'spartan.world_model.model'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_star_import_replaces_no_builtin() -> None:
    names: dict[str, object] = {}
    exec("from spartan.methods import *", names)
    assert "list" not in names
    assert names["Spartan"] is spartan.methods.Spartan


@pytest.mark.parametrize("old", sorted(set(old_names._MODULES) - old_names._PICKLED))
def test_old_modules_import_and_say_their_new_name(
    old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"spartan.{old}", raising=False)
    new = f"spartan.{old_names._MODULES[old]}"
    with pytest.warns(DeprecationWarning, match=f"spartan.{old} is called {new} now") as told:
        module = importlib.import_module(f"spartan.{old}")
    assert len(told) == 1
    source = importlib.import_module(new)
    public = [name for name in vars(source) if not name.startswith("_")]
    assert public
    assert all(getattr(module, name) is getattr(source, name) for name in public)


def test_old_classes_are_the_new_ones() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from spartan.always_sparse.growth import Growth
        from spartan.deploy.layers import SparseLinear
        from spartan.masking import MaskingSparsifier
        from spartan.methods.base import Method
        from spartan.methods.groups import Contest, contests_of
        from spartan.methods.sites import Site

        from spartan.selection.hard import find_cut
    groups = importlib.import_module("spartan.methods.masking.groups")
    assert (Contest, contests_of) == (groups.Competition, groups.competitions_of)
    assert find_cut is importlib.import_module("spartan.selection.hard").find_cutoff
    assert MaskingSparsifier is spartan.Sparsifier
    assert Growth is importlib.import_module("spartan.methods.growth").GrowthMethod
    assert SparseLinear.__name__ == "InferenceLinear"
    assert Method is importlib.import_module("spartan.methods.masking").MaskingMethod
    assert Site.__name__ == "MaskedWeight"


def test_old_keywords_keep_working() -> None:
    example = torch.zeros(1, 8)
    with pytest.warns(DeprecationWarning, match="sample_input= is called example_input="):
        budget = spartan.Budget(density=0.5, cost="flops", sample_input=example)
    assert budget.example_input is example


def test_old_attributes_keep_working() -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = spartan.Sparsifier(model, optimizer, "spartan", 0.5, 10)
    for old, now in (
        ("sites", sparsifier.weights),
        ("groups", sparsifier.run.groups),
        ("shares", sparsifier.budgets),
    ):
        with pytest.warns(DeprecationWarning, match=f"Sparsifier.{old} is called"):
            assert getattr(sparsifier, old) == now
    with pytest.raises(AttributeError, match="'sizes'"):
        _ = sparsifier.sizes  # type: ignore[attr-defined]


def test_a_script_is_told_where_it_names_what_moved(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import spartan\nimport spartan.patterns\n")
    told = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True
    ).stderr
    assert f"{script}:2: DeprecationWarning: spartan.patterns is called" in told


def test_every_file_says_what_it_holds() -> None:
    """The first line is a sentence, and no file is longer than a reader's patience."""
    root = Path(spartan.__file__).parent
    for path in root.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0].lstrip("r").startswith('"""'), path
        assert len(lines[0]) > 20, path
        assert len(lines) <= 420, path
