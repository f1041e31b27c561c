"""Every lineage is simulated and modelled: none is left out in silence."""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest

from gmem.uapi.lineage import Lineage
from tests.model.rules import RULES
from tests.sim.lineages import PLAYS, lineage_of, played


def test_every_lineage_is_simulated() -> None:
    assert set(PLAYS) == set(Lineage)
    assert {lineage_of(seed) for seed in range(len(Lineage))} == set(Lineage)


def test_every_lineage_is_modelled() -> None:
    assert set(RULES) == {str(lineage) for lineage in Lineage}


def test_both_play_the_same_page_sizes() -> None:
    sizes = {str(lineage): play.page_sizes for lineage, play in PLAYS.items()}
    assert {name: rules.page_sizes for name, rules in RULES.items()} == sizes


def test_a_lineage_without_a_row_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rest = {name: play for name, play in PLAYS.items() if name is not Lineage.IN_PLACE}
    assert played("IN_PLACE") is Lineage.IN_PLACE

    monkeypatch.setattr("tests.sim.lineages.PLAYS", rest)
    for word in ("IN_PLACE", "in_place", ""):
        with pytest.raises(ArgumentTypeError, match=rf"'{word}' is no lineage .*rows?"):
            played(word)
