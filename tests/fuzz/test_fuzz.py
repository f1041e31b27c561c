from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import TypeAlias

import pytest

from gmem.testing.conformance.kernel import Kernel, NoKernelError
from gmem.testing.hosts import missing_here
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE
from gmem.uapi.pages import PAGE_SIZE
from tests.fuzz.campaign import Campaign, DifferentError
from tests.fuzz.differences import Difference
from tests.fuzz.kernels import EMULATOR, KERNEL, player_on
from tests.fuzz.operations import (
    Bind,
    Create,
    Fallocate,
    Fstat,
    Load,
    Mmap,
    Operation,
    Store,
    Survey,
    write_script,
)
from tests.fuzz.player import OK, Player
from tests.fuzz.strategies import PUNCH, SHARED

EXAMPLES = 40
SHRINK_SECONDS = 5.0
FUZZ = (sys.executable, "-m", "tests.fuzz")

Kind: TypeAlias = "type[Operation] | UnionType"

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """The kernel of this machine, or a skip that says what it lacks."""
    try:
        kernel = Kernel()
    except NoKernelError as missing:
        pytest.skip(str(missing))
    with kernel:
        yield kernel


class ForgetsToPunch(Player):
    """PUNCH_HOLE of allocated memory drops nothing."""

    def play(self, operation: Operation) -> str:
        if isinstance(operation, Fallocate) and operation.mode == PUNCH:
            allocate = replace(operation, mode=FALLOC_FL_KEEP_SIZE)
            if super().play(allocate) == OK:
                return OK
        return super().play(operation)


class TakesOverlapsForBadArguments(Player):
    """A memslot on guest memory of another is EINVAL."""

    def play(self, operation: Operation) -> str:
        result = super().play(operation)
        return "EINVAL" if result == "EEXIST" else result


class HasPagesPastTheEnd(Player):
    """A load past the end reads zeros."""

    def play(self, operation: Operation) -> str:
        result = super().play(operation)
        return "00" if isinstance(operation, Load) and result == "SIGBUS" else result


class CountsBlocks(Player):
    """st_blocks has what the file was created with."""

    def play(self, operation: Operation) -> str:
        return super().play(operation).replace("blocks=0", "blocks=8")


@pytest.mark.parametrize(
    ("mistaken", "operations"),
    [
        (ForgetsToPunch, [Create, Mmap, Store, Fallocate, Load | Survey]),
        (TakesOverlapsForBadArguments, [Create, Bind, Bind]),
        (HasPagesPastTheEnd, [Create, Mmap, Load | Survey]),
        (CountsBlocks, [Create, Fstat]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mistake_is_found_and_shrunk(
    kernel: Kernel, mistaken: type[Player], operations: list[Kind]
) -> None:
    with Player(kernel) as right, mistaken(kernel) as wrong:
        report = Campaign(right, wrong).run(shrink_seconds=SHRINK_SECONDS)
    assert isinstance(report.failure, DifferentError)
    for operation, kind in zip(report.script, operations, strict=True):
        assert isinstance(operation, kind)


def test_a_shrunk_script_replays(kernel: Kernel, tmp_path: Path) -> None:
    script = tmp_path / "failure.jsonl"
    with Player(kernel) as right, HasPagesPastTheEnd(kernel) as wrong:
        report = Campaign(right, wrong).run(shrink_seconds=SHRINK_SECONDS)
    write_script(script, report.script)
    replayed = subprocess.run(
        [*FUZZ, "--replay", str(script), "--backend", KERNEL],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert [line.split()[0] for line in replayed] == ["0", "0", "SIGBUS"]


def test_a_listed_difference_is_counted_and_no_failure(kernel: Kernel) -> None:
    row = Difference(1, Fstat, "", "size=4096 blocks=0", "size=4096 blocks=8")
    script = [Create(0, 0, PAGE_SIZE, SHARED), Fstat(0), Fstat(0)]
    with Player(kernel) as right, CountsBlocks(kernel) as wrong:
        campaign = Campaign(right, wrong, [row])
        campaign.play(script)
        with pytest.raises(DifferentError, match="size=8192 blocks=8"):
            campaign.play([Create(0, 0, 2 * PAGE_SIZE, SHARED), Fstat(0)])
    assert campaign.report.met == {row: 2}


def test_the_emulated_host_answers_as_the_kernel(
    kernel: Kernel, record_property: Callable[[str, object], None]
) -> None:
    if missing := missing_here():
        pytest.skip(missing)
    with Player(kernel) as real, player_on(EMULATOR) as emulated:
        report = Campaign(real, emulated).run(examples=EXAMPLES)
    record_property("fuzz", report.lines()[0])
    assert report.failure is None, "\n".join(map(str, report.script))
