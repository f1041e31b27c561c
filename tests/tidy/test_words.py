"""Words that must not be where they are: another backend's, or nobody's any more."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sources import REPOSITORY, python_files, shown, text_files

# Only the allocator's HugeTLB backend, the vocabulary and people's tools know it.
NO_HUGETLB = [f"services/gmem/{name}" for name in ("guest_memfd", "vmm", "keeper")]
# A comment may cite a function or file of the kernel, which has the word inside.
WORD = re.compile(r"(?<![a-z0-9_])hugetlb(?![a-z0-9_])", re.IGNORECASE)
PART = re.compile("hugetlb", re.IGNORECASE)
# Split, so that this file does not find itself.
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
# Home and work directories of one machine; a path inside a container is none.
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:root|home|Users|work)/[\w.-]+")


def hugetlb_in(text: str) -> Iterator[int]:
    """The lines where code says it anywhere, or prose as a word of its own."""
    prose = _docstring_starts(text)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_prose = token.type == tokenize.COMMENT or token.start in prose
        if (WORD if is_prose else PART).search(token.string):
            yield token.start[0]


def _docstring_starts(text: str) -> set[tuple[int, int]]:
    """Where docstrings begin: strings that are statements of their own."""
    return {
        (node.lineno, node.col_offset)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def lines_with(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{shown(path)}:{number}: {line.strip()}"
        for path, text in text_files()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]


def test_only_the_allocator_says_hugetlb() -> None:
    files = [path for root in NO_HUGETLB for path in python_files(root)]
    assert files
    found = {shown(path): list(hugetlb_in(path.read_text())) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_nothing_is_left_to_be_done() -> None:
    assert lines_with(UNFINISHED) == []


def test_no_path_of_one_machine_is_written_down() -> None:
    assert lines_with(MACHINE_PATH) == []
    assert lines_with(re.compile(re.escape(str(REPOSITORY)) + r"\b")) == []


def test_text_files_are_found() -> None:
    names = {shown(path) for path, _ in text_files()}
    assert {"Makefile", "pyproject.toml", ".ci/run", shown(Path(__file__))} <= names


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('"""HugeTLB."""\n', [1]),
        ('"""As guestmem_hugetlb_split_folio() does."""\n', []),
        ("# hugetlb\n", [1]),
        ("# guestmem_hugetlb.c\n", []),
        ("x = 1\nuse_hugetlb = 2\n", [2]),
        ('x = "HugeTLB"\n', [1]),
        ('x = f"{y} hugetlb_pool"\n', [1]),
    ],
)
def test_hugetlb_is_recognised(text: str, lines: list[int]) -> None:
    assert list(hugetlb_in(text)) == lines
