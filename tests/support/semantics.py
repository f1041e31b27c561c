"""The conformance list as docs/semantics.md has it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gmem.runtime.config import parse_size
from gmem.testing.conformance.kvm import LINEAGES
from tests.support.sources import REPOSITORY

LIST = REPOSITORY / "docs" / "semantics.md"
DEVIATIONS = REPOSITORY / "docs" / "deviations.md"
_ROW = re.compile(r"\| (C\d{3}) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|")
_NUMBER = re.compile(r"- \*\*(\d+)\.")


@dataclass(frozen=True)
class Line:
    """One numbered line: where it belongs, and what it says."""

    id: str
    lineages: frozenset[str]
    page_sizes: frozenset[int]
    text: str


def lines_of(text: str) -> list[Line]:
    """Every row of the tables that begins with a number of the list."""
    found = [_ROW.fullmatch(line) for line in text.splitlines()]
    return [
        Line(
            match[1],
            frozenset(LINEAGES if match[2] == "all" else match[2].split(", ")),
            frozenset(parse_size(size) for size in match[3].split(", ")),
            match[4],
        )
        for match in found
        if match is not None
    ]


def deviation_numbers(text: str) -> set[int]:
    """The numbers that entries of docs/deviations.md begin with."""
    return {int(number) for number in _NUMBER.findall(text)}
