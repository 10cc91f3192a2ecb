"""Every cell of the table in docs/deployment.md is what happens."""

from __future__ import annotations

import os

import pytest

from tests.deploy import architectures
from tests.deploy.architectures import BLOCKS, names, table_rows

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about its own future
# Exporting all of them takes minutes: these few, unless the tests are to be thorough.
EXPORTED = ["inverted residual", "ResNet", "GPT-2"]
if os.environ.get("SPARTAN_TEST_THOROUGH"):
    EXPORTED = names()


@pytest.fixture(autouse=True)
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("accelerating", "choosing"):
        monkeypatch.setattr(f"spartan.deploy.{module}.time_side_by_side", architectures.sparse_wins)


@pytest.mark.parametrize("name", names())
def test_the_table_says_what_happens(name: str) -> None:
    if name not in BLOCKS:
        pytest.importorskip("transformers", reason="transformers is not installed")
    accelerated, purged, saved, exported = table_rows()[name]
    assert architectures.accelerated(name) == accelerated
    assert architectures.purged(name) == purged
    assert architectures.saved(name) == saved
    if name in EXPORTED:
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        assert architectures.exported(name) == exported


def test_the_table_has_all_of_them() -> None:
    assert list(table_rows()) == names()
