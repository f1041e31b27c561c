"""What the series disagree on is in one table, and every effect has one kind."""

from __future__ import annotations

import ast

import pytest

from gmem.effects import Effect, Mode
from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.lineage import RULES, Operation
from gmem.uapi.lineage import Lineage
from tests.support.sources import REPOSITORY, shown

CORE = REPOSITORY / "services" / "gmem" / "guest_memfd" / "core"


def test_every_lineage_has_rules_for_every_operation() -> None:
    assert set(RULES) == set(Lineage)
    for rules in RULES.values():
        assert set(rules.lock_modes) == set(Operation)


def test_only_the_guest_fault_of_the_first_series_is_without_a_lock() -> None:
    modes = RULES[Lineage.RFC_V1].lock_modes
    assert [op for op, mode in modes.items() if mode is None] == [Operation.GET_PFN]
    assert {op for op, mode in modes.items() if mode is Mode.SHARED} == {
        Operation.ALLOCATE,
        Operation.HOST_FAULT,
        Operation.PIN,
    }


def test_every_effect_is_of_exactly_one_kind() -> None:
    defined = [
        value
        for value in vars(fx).values()
        if isinstance(value, type) and issubclass(value, Effect) and value is not Effect
    ]
    kinds: list[type] = [*fx.REMOTE, *fx.BLOCKING, *fx.LOCAL]
    assert sorted(kinds, key=str) == sorted(defined, key=str)


@pytest.mark.parametrize("path", sorted(CORE.glob("*.py")), ids=shown)
def test_no_core_compares_lineages(path: object) -> None:
    tree = ast.parse(path.read_text())  # type: ignore[attr-defined]
    compared = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare | ast.Match) and "ineage" in ast.unparse(node)
    ]
    assert compared == []
