"""The table of the lineages in docs/semantics.md is what the code says."""

from __future__ import annotations

from dataclasses import fields

import pytest

from gmem.guest_memfd.core.lineage import RULES, LineageRules
from gmem.uapi.lineage import Lineage
from gmem.vmm.core.lineage import VM_RULES, VmRules
from tests.support import lineage_table
from tests.support.sources import REPOSITORY

# Rules that a row shows under another name, or that all rows together show; and one
# that is the same in all lineages so far.
ELSEWHERE = {"lock_modes", "creation", "restructure", "memory_failure"}


def test_the_table_is_up_to_date() -> None:
    text = lineage_table.PAGE.read_text()
    assert lineage_table.with_table(text) == text, "run `make tables`"


def test_every_lineage_has_a_column_and_the_parameter_one_more() -> None:
    titles = [column.title for column in lineage_table.columns()]
    assert titles == [*Lineage, "IN_PLACE, parameter off"]


@pytest.mark.parametrize("kind", [LineageRules, VmRules])
def test_every_rule_is_in_the_table(kind: type) -> None:
    source = (REPOSITORY / "tests" / "support" / "lineage_table.py").read_text()
    rules = {field.name for field in fields(kind)} - ELSEWHERE
    assert {name for name in rules if f"rules.{name}" not in source} == set()


def test_no_row_says_the_same_of_all_lineages() -> None:
    columns = lineage_table.columns()
    same = [
        label
        for label, look in lineage_table.ROWS.items()
        if len({look(column) for column in columns}) == 1
    ]
    assert same == []


def test_a_rule_that_changes_changes_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    before = lineage_table.table()
    first, second = RULES[Lineage.RFC_V1], RULES[Lineage.RFC_V2]
    swapped = {**RULES, Lineage.RFC_V1: second, Lineage.RFC_V2: first}
    monkeypatch.setattr(lineage_table, "rules_of", lambda **_: swapped)
    monkeypatch.setattr(lineage_table, "vm_rules_of", lambda **_: VM_RULES)
    assert lineage_table.table() != before
