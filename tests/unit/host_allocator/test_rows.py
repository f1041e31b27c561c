"""A host that is made again from its rows is the same host, at any moment."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import settings
from hypothesis.stateful import initialize, invariant, rule

from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.rows import HostRows, fits, restore
from gmem.host_allocator.core.values import BootPool
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M
from tests.support.rows import apply
from tests.unit.host_allocator.test_machine import Histories

NODE = 1 << 14


class Survivors(Histories):
    """The histories of test_machine, with restarts in between."""

    @initialize()
    def follow(self) -> None:
        self.rows: dict[str, Any] = {}
        self.teller: HostRows | None = None

    def told(self) -> None:
        if self.teller is None:
            self.teller = HostRows(self.memory)
        apply(self.rows, json.loads(json.dumps(self.teller.changes())))

    @rule()
    def restart(self) -> None:
        self.told()
        self.memory = restore(self.rows)
        self.teller = HostRows(self.memory, restored=True)
        assert self.teller.changes() == {}

    @invariant()
    def the_rows_tell_everything(self) -> None:
        if not hasattr(self, "memory"):
            return
        self.told()
        again = restore(self.rows)
        assert again.statistics() == self.memory.statistics()
        assert again.reservations() == self.memory.reservations()
        assert again.handles.next == self.memory.handles.next


TestSurvivors = Survivors.TestCase
TestSurvivors.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None
)


def host() -> HostMemory:
    return HostMemory([NODE, NODE], [BootPool(SIZE_2M, 6)])


def test_a_call_tells_only_what_it_changed() -> None:
    memory = host()
    teller = HostRows(memory)
    teller.changes()
    handle = memory.reserve(SIZE_2M, 3, owner="a")
    assert set(teller.changes()) == {
        "handles",
        f"pool/{SIZE_2M}",
        f"subpool/{SIZE_2M}/{handle}",
    }
    (folio,) = memory.allocate(handle, page_size=SIZE_2M)
    rows = teller.changes()
    assert rows[f"live/{SIZE_2M}/{folio.pfn}"] == [0, handle, "whole"]
    assert len(rows) <= 6
    assert rows["cgroup"]["sizes"][str(SIZE_2M)]["usage"]["usage"] == 1
    memory.free(handle, [folio])
    assert teller.changes()[f"live/{SIZE_2M}/{folio.pfn}"] is None
    assert teller.changes() == {}


def test_a_claim_that_ends_takes_its_runs_with_it() -> None:
    memory = host()
    teller = HostRows(memory)
    rows = apply({}, teller.changes())
    before = dict(rows)
    handle = memory.reserve(PAGE_SIZE, 8)
    folios = memory.allocate(handle, nr_folios=8)
    apply(rows, teller.changes())
    assert [key for key in rows if key.startswith(f"runs/claim/{handle}/")]
    memory.free(handle, folios)
    memory.unreserve(handle)
    apply(rows, teller.changes())
    assert rows == before | {"handles": handle + 1}


def test_rows_are_of_one_machine() -> None:
    rows = HostRows(host()).changes()
    assert fits(rows, [NODE, NODE])
    assert not fits(rows, [NODE])
