"""No core compares lineages: a difference is a row of a table, or a policy object."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

from gmem.uapi.lineage import Lineage
from tests.support.sources import REPOSITORY, shown

CORES = sorted((REPOSITORY / "services" / "gmem").glob("*/core/*.py"))
NAMES = {lineage.value for lineage in Lineage}


def _is_member(node: ast.AST) -> TypeGuard[ast.Attribute]:
    return (
        isinstance(node, ast.Attribute)
        and node.attr in NAMES
        and ast.unparse(node.value).endswith("Lineage")
    )


def _speaks_of_lineages(node: ast.AST) -> bool:
    """Tell whether a lineage, or the name of one, is in an expression."""
    words = ast.unparse(node).lower()
    names = {
        inner.value
        for inner in ast.walk(node)
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str)
    }
    return "lineage" in words or bool(names & NAMES)


def _deciders(tree: ast.AST) -> Iterator[ast.expr | ast.pattern]:
    """Yield what decides: comparisons, membership tests, and what is matched."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield node
        elif isinstance(node, ast.Match):
            yield node.subject
            yield from (case.pattern for case in node.cases)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("startswith", "endswith", "__eq__", "__contains__")
        ):
            yield node


def _rows(tree: ast.Module) -> set[int]:
    """Return the members that are keys of a table of the module, or a default."""
    allowed: set[int] = set()
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            tables = [n for n in ast.walk(statement) if isinstance(n, ast.Dict)]
            keys = [key for table in tables for key in table.keys if key is not None]
            allowed |= {id(part) for key in keys for part in ast.walk(key)}
        elif isinstance(statement, ast.ClassDef):
            # A field of a dataclass: what nobody chooses otherwise.
            fields = [f for f in statement.body if isinstance(f, ast.AnnAssign)]
            allowed |= {id(field.value) for field in fields if field.value is not None}
    return allowed


def decided_by_lineage(text: str) -> list[int]:
    """Return the lines in which a lineage decides, or stands outside a table."""
    tree = ast.parse(text)
    allowed = _rows(tree)
    found = {node.lineno for node in _deciders(tree) if _speaks_of_lineages(node)}
    found |= {
        node.lineno
        for node in ast.walk(tree)
        if _is_member(node) and id(node) not in allowed
    }
    return sorted(found)


def test_the_cores_are_found() -> None:
    names = {shown(path).split("/")[2] for path in CORES}
    assert names == {"guest_memfd", "host_allocator", "vmm"}


@pytest.mark.parametrize("path", CORES, ids=shown)
def test_no_core_compares_lineages(path: Path) -> None:
    assert decided_by_lineage(path.read_text()) == []


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("if inode.options.lineage is Lineage.RFC_V1: pass", [1]),
        ("x = 1\ny = lineage == other", [2]),
        ("if kind in (Lineage.RFC_V2, Lineage.MAINLINE): pass", [1]),
        ("if vm.lineage.value == 'RFC_V1': pass", [1]),
        ("if word in {'MAINLINE'}: pass", [1]),
        ("match options.lineage:\n  case _: pass", [1]),
        ("match kind:\n  case Lineage.RFC_V1: pass", [2]),
        ("if vm.lineage.startswith('RFC'): pass", [1]),
        ("def f():\n  return {Lineage.RFC_V1: 1}[x]", [2]),
        ("def f():\n  old = Lineage.RFC_V1", [2]),
        ("ROWS = {Lineage.RFC_V1: {1: 2}}", []),
        ("ROWS: Final = {Lineage.RFC_V1: f(Lineage.RFC_V2)}", [1]),
        ("class Options:\n  lineage: Lineage = Lineage.RFC_V1", []),
        ("rules = RULES[options.lineage]", []),
        ("text = f'a file of {options.lineage}'", []),
    ],
)
def test_a_decision_is_recognised(text: str, lines: list[int]) -> None:
    assert decided_by_lineage(text) == lines
