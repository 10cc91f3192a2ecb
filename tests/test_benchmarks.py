"""Benchmarks import: what they take from the library is there."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))


def test_benchmarks_find_what_they_import() -> None:
    lines = [
        "import ast, importlib, pathlib",
        f"for name in {BENCHMARKS!r}:",
        "    tree = ast.parse(pathlib.Path(f'{name}.py').read_text(encoding='utf-8'))",
        "    for node in ast.walk(tree):",
        "        if isinstance(node, ast.ImportFrom) and node.module.startswith('spartan'):",
        "            module = importlib.import_module(node.module)",
        "            for alias in node.names:",
        "                assert hasattr(module, alias.name) or importlib.import_module(",
        "                    f'{node.module}.{alias.name}'), (name, node.module, alias.name)",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(
        command, cwd=ROOT / "benchmarks", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
