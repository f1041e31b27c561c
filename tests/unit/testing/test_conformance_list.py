"""The list of docs/semantics.md, the cases, and the table of deviations agree."""

from __future__ import annotations

from collections import Counter

import pytest

from gmem.testing.conformance import cases
from gmem.testing.conformance.deviations import DEVIATIONS, Deviation
from gmem.testing.conformance.registry import all_cases, plan
from tests.support.semantics import DEVIATIONS as DEVIATIONS_PAGE
from tests.support.semantics import LIST, Line, deviation_numbers, lines_of

assert cases.__all__
LINES = lines_of(LIST.read_text())
ROWS = [row for rows in DEVIATIONS.values() for row in rows]
DEVIATIONS_MAX = 12
"""More than that need a reason each, where they are announced."""


def test_every_number_stands_there_once() -> None:
    counted = Counter(line.id for line in LINES)
    assert counted
    assert [number for number, n in counted.items() if n > 1] == []


def test_every_line_has_a_case_and_every_case_a_line() -> None:
    assert sorted(line.id for line in LINES) == sorted({one.id for one in all_cases()})


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.id)
def test_a_line_is_played_where_it_belongs(line: Line) -> None:
    played = [one for one in all_cases() if one.id == line.id]
    assert {name for one in played for name in one.lineages} == line.lineages
    assert {size for one in played for size in one.page_sizes} == line.page_sizes


def test_no_two_runs_have_one_name() -> None:
    names = Counter(map(str, plan(known=["RFC_V1", "RFC_V2", "IN_PLACE", "MAINLINE"])))
    assert [name for name, n in names.items() if n > 1] == []


def test_every_case_says_what_it_asks() -> None:
    assert [one.id for one in all_cases() if not one.title.endswith(".")] == []


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_deviation_stands_in_the_documents(row: Deviation) -> None:
    assert row.number in deviation_numbers(DEVIATIONS_PAGE.read_text())
    assert row.kernel != row.here


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_deviation_names_cases_of_each_of_its_lineages(row: Deviation) -> None:
    has = {(one.id, name) for one in all_cases() for name in one.lineages}
    for lineage in row.lineages:
        assert any((number, lineage) in has for number in row.cases), lineage


def test_deviations_are_few() -> None:
    assert len({row.number for row in ROWS}) <= DEVIATIONS_MAX
