"""Killed at any effect of any operation, the core is made again without damage.

The allocator and the page-state tables live on, the core is made of its rows. Every
operation is cut off before each of its effects in turn, recovered, and compared: it
must be what it was before, or what it is after.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from gmem.effects import Op
from gmem.guest_memfd.core import restoring
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.registry import GuestMemfdCore
from gmem.guest_memfd.core.restoring import LiveFolio
from gmem.guest_memfd.core.values import Folio, HoldKind, PageState, ViewKind
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, SIZE_2M, PgRange
from tests.support.gmem_table import Table
from tests.support.gmem_world import VM, GmemWorld, Task, part, whole

HOST, GUEST = ViewKind.HOST, ViewKind.GUEST
SIZE = 2 * SIZE_2M
PAGES = SIZE >> PAGE_SHIFT
Setup: TypeAlias = Callable[[GmemWorld], Inode]
Doing: TypeAlias = Callable[[GmemWorld, Inode], Op[Any]]


def live_folios(world: GmemWorld, handle: int) -> dict[int, LiveFolio]:
    live = {}
    for run in world.memory.folios(handle):
        for number in range(run.nr_folios):
            pfn = run.first.pfn + (number << run.first.order)
            folio = Folio(pfn, run.first.order, run.first.node)  # type: ignore[arg-type]
            live[pfn] = LiveFolio(folio, run.split)
    return live


def recover(world: GmemWorld, *, keep_tables: bool) -> None:
    """Do to the world what gmem.guest_memfd.restart does to a service."""
    core = GuestMemfdCore()
    core.restore(world.rows, epoch=1)
    world.core = core
    tables = world.tables if keep_tables else {}
    world.tables = {}
    left: list[tuple[int, list[LiveFolio]]] = []
    reserved = {claim.handle for claim in world.memory.reservations()}
    for number in core.numbers:
        inode = core.inode(number)
        if inode.handle not in reserved:
            core.forget(number)
            continue
        reserved.discard(inode.handle)
        old = tables.get(number)
        attached = (
            {} if old is None else {u << old.order: p for u, p in old.frames.items()}
        )
        live = live_folios(world, inode.handle)
        left.append((inode.handle, restoring.reconcile(inode, live, attached)))
        restore_table(world, inode, old)
    for handle, folios in left:
        world.run(restoring.give_back(handle, folios))
    for handle in reserved:
        world.run(restoring.give_back(handle, [*live_folios(world, handle).values()]))
        if handle in {
            claim.handle for claim in world.memory.reservations() if not claim.closing
        }:
            world.memory.unreserve(handle)
    for number in core.numbers:
        world.run(core.evict_if_unused(number))


def restore_table(world: GmemWorld, inode: Inode, old: Table | None) -> None:
    """Fit a table, a predecessor's or a new one, as `restart` and `recovery` do."""
    nr_pages = len(inode.whole)
    if old is None:
        old = Table(
            inode.order,
            {v: bytearray(nr_pages) for v in ViewKind},
            bytearray(nr_pages),
        )
    for unit, pfn in list(old.frames.items()):
        entry = inode.filemap.get(unit << old.order)
        fits = entry is not None and entry.folio.pfn == pfn
        if fits and entry and (entry.split or not inode.wants_split(unit << old.order)):
            inode.filemap.set_attached(unit << old.order, attached=True)
        else:
            del old.frames[unit]
    for pgoff in range(nr_pages):
        shared = inode.faultability[pgoff] is Faultability.ALL
        old.views[ViewKind.HOST][pgoff] = 2 * shared
        old.views[ViewKind.GUEST][pgoff] = 2 * (not shared)
        if old.pfn_of(pgoff) is None:
            old.uptodate[pgoff] = 0
    world.tables[inode.number] = old


def huge_shared(world: GmemWorld) -> Inode:
    """Two huge pages, shared, with a folio each."""
    inode = world.bound(SIZE, SIZE_2M)
    world.run(world.core.fallocate(inode.number, 1, 0, SIZE))
    world.write(inode, HOST, 3, "theirs")
    return inode


def huge_private(world: GmemWorld) -> Inode:
    inode = world.bound(SIZE, SIZE_2M, shared=False)
    world.run(world.core.fallocate(inode.number, 1, 0, SIZE))
    world.write(inode, GUEST, 3, "secret")
    return inode


def small_mixed(world: GmemWorld) -> Inode:
    inode = world.bound(32 * PAGE_SIZE)
    world.run(world.core.fallocate(inode.number, 1, 0, 32 * PAGE_SIZE))
    world.run(world.convert(part(inode, 4, 8), shared=False))
    world.write(inode, GUEST, 5, "secret")
    return inode


def pinned(world: GmemWorld) -> Inode:
    inode = huge_shared(world)
    pin = world.core.pin(part(inode, 0), HoldKind.PIN, holder="nic", client="c/1")
    assert world.run(pin) == 1
    world.run(world.core.fallocate(inode.number, 3, 0, SIZE_2M))
    return inode


def closed_but_held(world: GmemWorld) -> Inode:
    inode = pinned(world)
    world.run(world.core.close(inode.number))
    return inode


CASES: dict[str, tuple[Setup, Doing]] = {
    "create": (
        huge_shared,
        lambda world, _: world.core.create(huge_options()),
    ),
    "fault a hole": (
        lambda world: world.bound(SIZE, SIZE_2M),
        lambda world, inode: world.fault(inode, 5),
    ),
    "guest fault": (
        lambda world: world.bound(SIZE, SIZE_2M, shared=False),
        lambda world, inode: world.get_pfn(inode, 5),
    ),
    "allocate 4K pages": (
        lambda world: world.bound(32 * PAGE_SIZE),
        lambda world, i: world.core.fallocate(i.number, 1, 0, 32 * PAGE_SIZE),
    ),
    "to private, whole": (
        huge_shared,
        lambda world, inode: world.convert(whole(inode), shared=False),
    ),
    "to private, part": (
        huge_shared,
        lambda world, inode: world.convert(part(inode, 500, 20), shared=False),
    ),
    "to shared, part": (
        huge_private,
        lambda world, inode: world.convert(part(inode, 500, 20), shared=True),
    ),
    "to shared, two ranges": (
        huge_private,
        lambda world, inode: world.convert(
            part(inode, 0, 2), part(inode, 600, 2), shared=True
        ),
    ),
    "4K to shared": (
        small_mixed,
        lambda world, inode: world.convert(part(inode, 0, 32), shared=True),
    ),
    "punch a huge page": (
        huge_shared,
        lambda world, inode: world.core.fallocate(inode.number, 3, 0, SIZE_2M),
    ),
    "punch 4K pages": (
        small_mixed,
        lambda world, inode: world.core.fallocate(
            inode.number, 3, PAGE_SIZE, 8 * PAGE_SIZE
        ),
    ),
    "bind": (
        lambda world: world.create(SIZE, SIZE_2M),
        lambda world, inode: world.bind(inode),
    ),
    "unbind": (
        huge_shared,
        lambda world, inode: world.core.unbind(inode.number, VM, 0),
    ),
    "pin": (
        huge_shared,
        lambda world, inode: world.core.pin(
            part(inode, 0), HoldKind.PIN, holder="nic", client="c/1"
        ),
    ),
    "unpin what was punched": (pinned, lambda world, _: world.core.unpin(1)),
    "unpin the last of a closed file": (
        closed_but_held,
        lambda world, _: world.core.unpin(1),
    ),
    "close": (huge_shared, lambda world, inode: world.core.close(inode.number)),
}


def huge_options() -> Any:
    from gmem.guest_memfd.core.inode import InodeOptions

    return InodeOptions(size=SIZE, page_size=SIZE_2M, vm=VM)


def shared_map(world: GmemWorld, inode: Inode) -> list[tuple[PgRange, Faultability]]:
    found = world.core.find(inode.number)
    if found is None:
        return []
    runs = found.faultability.runs(found.whole)
    return [(fragment.pages, fragment.faultability) for fragment in runs]


@pytest.mark.parametrize("keep_tables", [True, False], ids=["tables kept", "lost"])
@pytest.mark.parametrize("name", CASES)
def test_killed_before_any_effect_it_is_before_or_after(
    name: str, keep_tables: bool
) -> None:
    setup, doing = CASES[name]
    world = GmemWorld()
    inode = setup(world)
    before = shared_map(world, inode)
    world.run(doing(world, inode))
    after, folios_after = shared_map(world, inode), world.memory.statistics().levels()

    cuts = 0
    while True:
        world = GmemWorld()
        inode = setup(world)
        rows = dict(world.rows)
        task = Task(world, doing(world, inode))
        for _ in range(cuts):
            if task.done:
                break
            assert task.step()
        is_done = task.done
        if not is_done:
            task.bury()
        recover(world, keep_tables=keep_tables)
        world.check()
        found = shared_map(world, inode)
        assert found in (before, after), f"half of it, cut before effect {cuts}"
        if is_done:
            assert found == after
            assert world.memory.statistics().levels() == folios_after
            break
        if world.rows == rows and found:
            # Nothing of it was recorded: at most its folios have moved.
            assert found == before
        _require_no_secret(world, inode)
        cuts += 1
    assert cuts > 0


def _require_no_secret(world: GmemWorld, inode: Inode) -> None:
    """What the guest wrote is nowhere that the host can read."""
    found = world.core.find(inode.number)
    if found is None:
        return
    table = world.tables[inode.number]
    for pgoff in (3, 5):
        if pgoff < table_pages(found) and table.views[HOST][pgoff] == PageState.OPEN:
            assert world.read(found, HOST, pgoff) != "secret"


def table_pages(inode: Inode) -> int:
    return len(inode.whole)


def test_recovery_is_the_identity_when_nothing_was_under_way() -> None:
    world = GmemWorld()
    first, second = huge_shared(world), small_mixed(world)
    world.run(world.core.pin(part(first, 0), HoldKind.PIN, holder="nic", client="c/1"))
    world.run(world.core.fallocate(first.number, 3, 0, SIZE_2M))
    world.run(world.convert(part(first, 700, 9), shared=False))
    before = world.snapshot()
    recover(world, keep_tables=True)
    assert world.snapshot() == before
    world.check()
    # Its numbers go on, and are not given twice.
    assert world.create(SIZE_2M, SIZE_2M).number == second.number + 1
    hold = world.run(
        world.core.pin(part(second, 0), HoldKind.PIN, holder="nic", client="c/1")
    )
    assert hold == 1 << 32


def test_a_killed_conversion_keeps_the_bytes() -> None:
    world = GmemWorld()
    inode = huge_shared(world)
    task = Task(world, world.convert(part(inode, 500, 2), shared=False))
    for _ in range(4):
        task.step()
    task.bury()
    recover(world, keep_tables=True)
    assert world.read(world.core.inode(inode.number), HOST, 3) == "theirs"


def test_everything_was_handed_out_for_all_a_successor_knows() -> None:
    world = GmemWorld()
    inode = huge_private(world)
    world.run(world.get_pfn(inode, 3))
    recover(world, keep_tables=True)
    (binding,) = world.core.inode(inode.number).bindings.handed_out_in(
        PgRange(0, PAGES)
    )
    assert binding[1] == PgRange(0, PAGES)
