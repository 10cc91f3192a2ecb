"""Every Python block of the README and the docs runs, page by page, from top to bottom."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


WITH_CODE = [page for page in PAGES if blocks_of(page)]


def test_pages_show_code() -> None:
    """All but the one on the code itself, and the one of figures."""
    without = {page.name for page in PAGES} - {page.name for page in WITH_CODE}
    assert without == {"architecture.md", "benchmarks.md"}


@pytest.mark.filterwarnings("error::DeprecationWarning")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "block"}
    for number, block in enumerate(blocks_of(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec", dont_inherit=True), names)
    assert set(names) > {"__name__", "__builtins__"}  # something was imported or made


@cache
def defined_in(path: Path) -> set[str]:
    """Names that a source file defines at its top level, and methods as Class.method."""
    if path.suffix != ".py":
        return set(
            re.findall(r"^[\w:<>&* ]*?\b(\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
        )
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            parts = (part.name for part in node.body if isinstance(part, ast.FunctionDef))
            names |= {f"{node.name}.{part}" for part in parts}
    return names


def test_the_page_on_the_code_is_true() -> None:
    """Files that it names exist, and hold the functions named with them."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    source = ROOT / "src" / "spartan"
    for path in re.findall(r"`([\w/]+(?:\.py|\.cpp|/))`", text):
        assert (source / path).exists(), path
    named = re.findall(r"`([\w/]+\.(?:py|cpp))`: ((?:`[\w.]+`(?:,| and)? ?)+)", text)
    assert len(named) > 40
    for path, names in named:
        for name in re.findall(r"`([\w.]+)`", names):
            assert name in defined_in(source / path), f"{path} has no {name}"
