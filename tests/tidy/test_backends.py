"""The list of what plain memfds cannot do names tests that are run on both backends."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.backends import WEAKER
from tests.support.sources import REPOSITORY


def _modules_on_both() -> dict[str, Path]:
    return {
        f"{ring}/{path.name}": path
        for ring in ("cluster", "contract")
        for path in (REPOSITORY / "tests" / ring).glob("test_*.py")
        if "\nBACKENDS = BOTH\n" in path.read_text()
    }


@pytest.mark.parametrize("entry", WEAKER)
def test_an_entry_names_a_test_that_runs_on_both(entry: str) -> None:
    """That it is needed, its own run shows: it is expected to fail, strictly."""
    file, _, name = entry.partition("::")
    path = _modules_on_both().get(file)
    assert path is not None, f"{file} does not say BACKENDS = BOTH"
    functions = {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert name in functions
    assert WEAKER[entry]
