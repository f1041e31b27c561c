"""Do known mistakes still apply, and does whoever runs them notice a survivor?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.mutants.layers import LAYERS
from tests.mutants.mutant import Mutant
from tests.mutants.running import require_caught, require_passed
from tests.support.sources import REPOSITORY

ALL = {(layer, name): m for layer, found in LAYERS.items() for name, m in found.items()}
TEST = "tests/unit/uapi/test_pages.py"
HALF_A_PAGE = Mutant(
    "gmem.uapi.pages", "PAGE_SHIFT: Final = 12", "PAGE_SHIFT: Final = 11", TEST
)


@pytest.mark.parametrize(("layer", "name"), ALL)
def test_a_mutation_applies_and_its_test_is_there(layer: str, name: str) -> None:
    mutant = ALL[layer, name]
    assert mutant.source != mutant.path.read_text()
    compile(mutant.source, mutant.path, "exec")
    path, _, test = mutant.caught_by.partition("::")
    assert f"def {test.partition('[')[0]}(" in (REPOSITORY / path).read_text()


def test_there_are_at_least_twelve() -> None:
    assert len(ALL) >= 12


def test_a_mutant_that_a_test_fails_on_is_caught() -> None:
    assert require_caught(HALF_A_PAGE).problem == ""
    assert require_passed([TEST]).problem == ""


def test_a_survivor_is_a_problem() -> None:
    harmless = replace(HALF_A_PAGE, old="Pages, frames", new="Frames, pages")
    assert require_caught(harmless).problem == "SURVIVED"


def test_a_mutation_that_no_longer_applies_is_a_problem() -> None:
    gone = replace(HALF_A_PAGE, old="PAGE_SHIFT: Final = 13")
    assert "no longer applies" in require_caught(gone).problem
    same = replace(HALF_A_PAGE, new=HALF_A_PAGE.old)
    assert require_caught(same).problem == "it changes nothing"


def test_a_test_that_cannot_be_run_has_caught_nothing() -> None:
    nowhere = replace(HALF_A_PAGE, caught_by="tests/unit/uapi/test_nothing.py")
    assert "status 4" in require_caught(nowhere).problem


def test_a_test_that_fails_without_a_mutant_is_a_problem() -> None:
    assert "without a mutant" in require_passed(["tests/unit/uapi/test_no.py"]).problem
