"""Do the cores do what the reference model says, step by step?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, format_size
from tests.model.machine import Machine
from tests.model.reference import Exit
from tests.model.rules import DEVIATIONS, RULES
from tests.support.sources import REPOSITORY, python_files

STEPS_PER_EXAMPLE = 50
# With fewer steps of a machine it may not have come to each of its calls.
STEPS_FOR_EVERY_CALL = 2000
CASES = [
    (Lineage(lineage), page_size)
    for lineage, rules in RULES.items()
    for page_size in rules.page_sizes
]
EVERY_CALL = (
    "create",
    "close",
    "fallocate",
    "pin",
    "unpin",
    "set_region",
    "set_attributes",
    "set_attributes2",
    "convert_file",
    "guest_access",
    "populate",
)


def named(case: tuple[Lineage, int]) -> str:
    return f"{case[0]}-{format_size(case[1])}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_cores_agree_with_the_model(
    case: tuple[Lineage, int],
    request: pytest.FixtureRequest,
    report_line: Callable[[str], None],
) -> None:
    steps = request.config.getoption("--steps") // len(CASES)
    counts: Counter[str] = Counter()
    attributes = {"lineage": case[0], "page_size": case[1], "steps": counts}
    machine = type("AModelled" + named(case), (Machine,), attributes)
    seed = request.config.getoption("--model-seed")
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(1, steps // STEPS_PER_EXAMPLE),
            stateful_step_count=STEPS_PER_EXAMPLE,
            derandomize=seed is None,
            database=None,
            deadline=None,
            print_blob=False,
            phases=[Phase.generate]
            if request.config.getoption("--no-shrink")
            else [Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
    told = ", ".join(f"{count} {call}" for call, count in sorted(counts.items()))
    report_line(f"model, {named(case)}: {told}")
    if steps >= STEPS_FOR_EVERY_CALL:
        expected = set(EVERY_CALL) - set(RULES[str(case[0])].never)
        assert [call for call in expected if not counts[call]] == []


def test_each_deviation_of_the_model_is_listed() -> None:
    text = (REPOSITORY / "docs" / "deviations.md").read_text()
    assert [number for number in DEVIATIONS if f"- **{number}. " not in text] == []


def test_each_deviation_is_where_the_model_asks_for_it() -> None:
    texts = [path.read_text() for path in python_files("tests/model")]
    asked = {
        int(number)
        for text in texts
        for number in re.findall(r"differs\((\d+)\)", text)
    }
    assert asked == set(DEVIATIONS)


def test_the_model_shares_no_code_with_the_cores() -> None:
    for name in ("conversion", "inode", "pool", "reference", "rules"):
        text = (REPOSITORY / "tests" / "model" / f"{name}.py").read_text()
        assert "gmem" not in {
            word
            for line in re.findall(r"^(?:from|import) (\S+)", text, re.MULTILINE)
            for word in [line.partition(".")[0]]
        }


@pytest.mark.parametrize("page_size", [SIZE_2M, SIZE_1G])
def test_both_stop_in_place_at_the_same_huge_page(page_size: int) -> None:
    """Few histories come to the second huge page before memory runs out."""
    attributes = {"lineage": Lineage.IN_PLACE, "page_size": page_size}
    machine = type("AModelledStop", (Machine,), attributes | {"steps": Counter()})()
    machine.boot()
    number = machine.open[0]
    inode = machine.model.inodes[number]
    whole, unit, shared = (0, "start", "rest"), inode.unit, range(inode.nr_pages)
    machine.fallocate(file=0, place=whole, odd=0, mode=1)

    machine.run_short(folios=1)
    convert = {"file": 0, "place": whole, "odd": 0, "more": {}}
    machine.convert_file(to=1, **convert)
    machine.everything_agrees()
    assert machine.steps["set_attributes2 ENOMEM"] == 1
    assert inode.runs(shared, 1) == [range(unit)]

    machine.recover()
    machine.convert_file(to=1, **convert)
    machine.pin(file=0, place=(1, "last", 1), pin=False)
    machine.convert_file(to=0, **convert)
    machine.everything_agrees()
    assert machine.steps["set_attributes2 EAGAIN"] == 1
    assert inode.runs(shared, 1) == [range(unit, inode.nr_pages)]


def test_a_guest_reaches_what_userspace_maps_elsewhere() -> None:
    """The userspace side of the first series may begin at another page of the file."""
    attributes = {"lineage": Lineage.RFC_V1, "page_size": PAGE_SIZE}
    machine = type("AModelledSide", (Machine,), attributes | {"steps": Counter()})()
    machine.boot()
    inode = machine.model.inodes[machine.open[0]]
    slot = {"vm": "a", "slot": 0, "file": 0, "unit": 0, "odd": (0, 0, 0), "flags": 4}
    machine.set_region(units=0, first=0, elsewhere=0, **slot)
    machine.set_region(units=3, first=0, elsewhere=PAGE_SIZE, **slot)
    access = {"vm": "a", "slot": 0, "meant": None, "write": True}

    machine.guest_access(place=(0, "start", 1), **access)
    machine.everything_agrees()
    assert set(inode.content) == {1}

    # Its last page is one behind the end of the file.
    last = inode.nr_pages - 1
    assert machine.cores.guest_access("a", last, None, write=True).errno == -1
    assert machine.model.guest_access("a", last, None) == Exit(-1, private=False)
    machine.everything_agrees()
