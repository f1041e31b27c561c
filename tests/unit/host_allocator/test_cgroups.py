"""HugeTLB cgroups: what is charged, when, to whom, and what a limit refuses."""

from __future__ import annotations

import pytest

from gmem.host_allocator.core import cgroups
from gmem.host_allocator.core.cgroups import ROOT, Cgroups
from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.rows import HostRows, restore
from gmem.host_allocator.core.values import BootPool, Charging
from gmem.uapi.errors import Errno, Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.support.rows import apply
from tests.unit.host_allocator.hosts import HUGE, PAGES_PER_1G, refused

NR = 4


def host() -> HostMemory:
    pools = [BootPool(SIZE_1G, NR), BootPool(SIZE_2M, 2 * NR)]
    memory = HostMemory([NR * PAGES_PER_1G + 3 * PAGES_PER_1G], pools)
    memory.cgroups.create("/a")
    memory.cgroups.create("/a/b")
    memory.cgroups.create("/c")
    return memory


def charged(memory: HostMemory, name: str, page_size: int) -> tuple[int, int]:
    """Usage and rsvd, in pages."""
    counters = memory.cgroups.get(name).sizes[page_size]
    return counters.usage.usage, counters.rsvd.usage


def events(memory: HostMemory, name: str, page_size: int) -> tuple[int, int]:
    counters = memory.cgroups.get(name).sizes[page_size]
    return counters.events, counters.events_local


@HUGE
@pytest.mark.parametrize("rsvd", [True, False], ids=["RFC_V2", "RFC_V1"])
def test_the_life_of_a_charge(page_size: int, rsvd: bool) -> None:
    """The rows H0 to G4 of the reporting test, for a cgroup and those above it."""
    memory = host()

    def expect(f: int, r: int) -> None:
        memory.check_frames()
        for name in ("/a/b", "/a", ROOT):
            assert charged(memory, name, page_size) == (f, r * rsvd), name
        assert charged(memory, "/c", page_size) == (0, 0)

    handle = memory.reserve(page_size, 2, charging=Charging("/a/b", rsvd=rsvd))
    expect(0, 2)
    (folio,) = memory.allocate(handle, page_size=page_size)
    expect(1, 2)
    memory.split(handle, folio)
    expect(1, 2)
    memory.reconstruct(handle, folio, page_size // PAGE_SIZE)
    memory.free(handle, [folio])
    expect(0, 2)
    (folio,) = memory.allocate(handle, page_size=page_size)
    # The inode is gone, a folio is still out: both charges stay until it is back.
    memory.unreserve(handle)
    expect(1, 2)
    memory.free(handle, [folio])
    expect(0, 0)
    assert memory.cgroups.get("/a").sizes[page_size].usage.watermark == 1


@HUGE
def test_a_reservation_above_rsvd_max_is_refused(page_size: int) -> None:
    memory = host()
    memory.cgroups.set_limit("/a", page_size, 2 * page_size, rsvd=True)
    below = Charging("/a/b", rsvd=True)
    handle = memory.reserve(page_size, 1, charging=below)
    with refused(memory, Reason.CGROUP_LIMIT) as caught:
        memory.reserve(page_size, 2, charging=below)
    assert caught.value.errno == Errno.ENOMEM
    assert "rsvd.max of cgroup /a:" in caught.value.sentence
    assert events(memory, "/a/b", page_size) == (1, 1)
    assert events(memory, "/a", page_size) == (1, 0)
    # Who is not charged for reservations is not refused.
    memory.reserve(page_size, 2, charging=Charging("/a/b"))
    memory.reserve(page_size, 1, charging=below)
    memory.unreserve(handle)
    assert charged(memory, "/a", page_size) == (0, 1)


@HUGE
def test_an_allocation_takes_what_the_limit_leaves_and_then_nothing(
    page_size: int,
) -> None:
    memory = host()
    memory.cgroups.set_limit("/a", page_size, 2 * page_size, rsvd=False)
    handle = memory.reserve(page_size, NR, charging=Charging("/a"))
    folios = memory.allocate(handle, page_size=page_size, nr_folios=NR)
    assert len(folios) == 2
    with refused(memory, Reason.CGROUP_LIMIT) as caught:
        memory.allocate(handle, page_size=page_size)
    assert "B.max of cgroup /a:" in caught.value.sentence
    memory.free(handle, folios[:1])
    assert len(memory.allocate(handle, page_size=page_size, nr_folios=NR)) == 1


def test_a_pool_that_is_empty_charges_nothing() -> None:
    memory = host()
    with refused(memory, Reason.POOL_EMPTY):
        memory.reserve(SIZE_1G, NR + 1, charging=Charging("/a", rsvd=True))
    assert charged(memory, "/a", SIZE_1G) == (0, 0)
    assert events(memory, "/a", SIZE_1G) == (0, 0)


def test_a_poisoned_folio_is_charged_until_it_is_freed() -> None:
    memory = host()
    handle = memory.reserve(SIZE_2M, 1, charging=Charging("/c", rsvd=True))
    (folio,) = memory.allocate(handle, page_size=SIZE_2M)
    memory.inject(folio.pfn)
    assert charged(memory, "/c", SIZE_2M) == (1, 1)
    memory.free(handle, [folio])
    memory.unreserve(handle)
    assert charged(memory, "/c", SIZE_2M) == (0, 0)


def test_limits_are_rounded_down_to_pages_and_taken_away() -> None:
    memory = host()
    memory.cgroups.set_limit("/a", SIZE_2M, SIZE_2M + 5, rsvd=False)
    assert memory.cgroups.get("/a").sizes[SIZE_2M].usage.max == 1
    handle = memory.reserve(SIZE_2M, 3, charging=Charging("/a"))
    assert len(memory.allocate(handle, page_size=SIZE_2M, nr_folios=3)) == 1
    memory.cgroups.set_limit("/a", SIZE_2M, None, rsvd=False)
    assert len(memory.allocate(handle, page_size=SIZE_2M, nr_folios=3)) == 2
    # A limit below what is charged refuses more, and takes nothing.
    memory.cgroups.set_limit("/a", SIZE_2M, 0, rsvd=False)
    assert charged(memory, "/a", SIZE_2M) == (3, 0)


def test_small_pages_are_charged_to_nobody() -> None:
    memory = host()
    handle = memory.reserve(PAGE_SIZE, 3, charging=Charging("/a", rsvd=True))
    memory.allocate(handle, nr_folios=3)
    assert charged(memory, "/a", SIZE_2M) == charged(memory, "/a", SIZE_1G) == (0, 0)
    with refused(memory, Reason.CGROUP_UNKNOWN):
        memory.reserve(PAGE_SIZE, 1, charging=Charging("/nobody"))


def test_the_parent_of_a_deleted_cgroup_has_its_charges() -> None:
    memory = host()
    handle = memory.reserve(SIZE_2M, 1, charging=Charging("/a/b", rsvd=True))
    (folio,) = memory.allocate(handle, page_size=SIZE_2M)
    memory.delete_cgroup("/a/b")
    assert charged(memory, "/a", SIZE_2M) == (1, 1)
    memory.check_frames()
    memory.free(handle, [folio])
    memory.unreserve(handle)
    assert charged(memory, "/a", SIZE_2M) == charged(memory, ROOT, SIZE_2M) == (0, 0)


@pytest.mark.parametrize(
    "name", ["", "a", "/", "//", "/a/", "/a b", "/" + "x" * 64, "/a" * 9, "/\n"]
)
def test_what_is_no_path_is_refused(name: str) -> None:
    memory = host()
    reason = Reason.CGROUP_EXISTS if name == ROOT else Reason.ARGUMENT_INVALID
    with refused(memory, reason):
        memory.cgroups.create(name)


def test_a_cgroup_is_made_once_and_below_its_parent() -> None:
    memory = host()
    with refused(memory, Reason.CGROUP_EXISTS):
        memory.cgroups.create("/a")
    with refused(memory, Reason.CGROUP_UNKNOWN):
        memory.cgroups.create("/x/y")
    names = [cgroup.name for cgroup in memory.cgroups]
    assert names == ["/", "/a", "/a/b", "/c"]


def test_the_root_and_parents_stay() -> None:
    memory = host()
    for name in (ROOT, "", "/a"):
        with refused(memory, Reason.OBJECT_IN_USE):
            memory.delete_cgroup(name)
    with refused(memory, Reason.CGROUP_UNKNOWN):
        memory.delete_cgroup("/x")


def test_limits_are_of_cgroups_and_pools_that_are_there() -> None:
    memory = host()
    rows = [
        ("/x", SIZE_2M, Reason.CGROUP_UNKNOWN),
        ("/a", PAGE_SIZE, Reason.PAGE_SIZE_UNKNOWN),
        (ROOT, SIZE_2M, Reason.STATE_WRONG),
    ]
    for name, size, reason in rows:
        with refused(memory, reason):
            memory.cgroups.set_limit(name, size, 1, rsvd=False)


def test_there_are_so_many_cgroups_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cgroups, "CGROUPS_MAX", 2)
    some = Cgroups()
    some.create("/a")
    with pytest.raises(OSError, match="limit_reached"):
        some.create("/b")


def test_cgroups_survive_in_the_rows() -> None:
    memory = host()
    teller = HostRows(memory)
    rows = apply({}, teller.changes())
    memory.cgroups.set_limit("/a", SIZE_2M, 3 * SIZE_2M, rsvd=True)
    handle = memory.reserve(SIZE_2M, 3, charging=Charging("/a/b", rsvd=True))
    memory.allocate(handle, page_size=SIZE_2M)
    with refused(memory, Reason.CGROUP_LIMIT):
        memory.reserve(SIZE_2M, 1, charging=Charging("/a", rsvd=True))
    memory.delete_cgroup("/c")
    apply(rows, teller.changes())
    again = restore(rows)
    assert list(again.cgroups) == list(memory.cgroups)
    assert again.reservations() == memory.reservations()
    again.check_frames()
    assert HostRows(again, restored=True).changes() == {}
