"""Functions and files stay short enough to be read at once."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.support.sources import python_files, shown

FUNCTION_LINES_MAX = 50
FILE_LINES_MAX = 500
# Over services and clients; a test may be a longer history.
FUNCTION_MEDIAN_MAX = 8
FUNCTION_P90_MAX = 30

type_of_function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def function_lines(path: Path) -> list[tuple[int, str]]:
    """The length of each function without its docstring, and where it stands."""
    return [
        (_lines(node), f"{shown(path)}:{node.lineno} {node.name}")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, type_of_function)
    ]


def _lines(node: type_of_function) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1 - _docstring_lines(node)


def _docstring_lines(node: type_of_function) -> int:
    if ast.get_docstring(node, clean=False) is None:
        return 0
    first = node.body[0]
    assert first.end_lineno is not None
    return first.end_lineno - first.lineno + 1


def percentile(values: list[int], percent: int) -> int:
    """The smallest value that `percent` of `values` do not pass."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def test_no_function_is_longer_than_a_screen() -> None:
    files = python_files("services", "clients", "tests", "protos")
    all_of_them = [found for path in files for found in function_lines(path)]
    too_long = [f"{where}: {n}" for n, where in all_of_them if n > FUNCTION_LINES_MAX]
    assert too_long == []


def test_no_file_is_longer_than_one_idea() -> None:
    files = python_files("services", "clients", "tests", "protos")
    lengths = {shown(path): len(path.read_text().splitlines()) for path in files}
    assert {name: n for name, n in lengths.items() if n > FILE_LINES_MAX} == {}


@pytest.mark.parametrize("root", ["services", "clients"])
def test_most_functions_are_short(
    root: str, report_line: Callable[[str], None]
) -> None:
    files = python_files(root)
    lines = [n for path in files for n, _ in function_lines(path)]
    assert lines, f"no function below {root}"

    median, p90 = statistics.median(lines), percentile(lines, 90)
    file_median = statistics.median(len(p.read_text().splitlines()) for p in files)
    report_line(
        f"{root}: {len(lines)} functions, median {median:g} lines, p90 {p90}, "
        f"max {max(lines)}; {len(files)} files, median {file_median:g} lines"
    )
    assert median <= FUNCTION_MEDIAN_MAX
    assert p90 <= FUNCTION_P90_MAX


def test_a_docstring_is_not_counted(tmp_path: Path) -> None:
    node = ast.parse('def f():\n    """One.\n\n    Two.\n    """\n    return 1\n').body[
        0
    ]
    assert isinstance(node, ast.FunctionDef)
    assert _docstring_lines(node) == 4
