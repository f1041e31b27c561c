"""A world for the guest_memfd core: the real allocator core, and doubles for the rest.

One thread, no clock, no chance. A Task is an operation that is stepped by hand, so a
test says which of two operations goes on:

    one = world.task(core.host_fault(ino, 0))
    one.run_until(Allocate)          # it has asked; nothing was answered yet
    world.run(core.host_fault(ino, 0))
    one.finish()                     # the loser

The page store is a dict from frame to a value: what was written there, 0 for zeros.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import singledispatchmethod
from typing import Any, TypeAlias, TypeVar

import pytest

from gmem.effects import Effect, Op, Release
from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.inode import Inode, InodeOptions
from gmem.guest_memfd.core.inodes import ByteRange
from gmem.guest_memfd.core.registry import GuestMemfdCore
from gmem.guest_memfd.core.values import (
    Folio,
    HostMapping,
    InodeStatistics,
    PageState,
    ViewKind,
)
from gmem.host_allocator.core import values as allocator
from gmem.host_allocator.core.host_memory import HostMemory
from gmem.uapi.errors import (
    KernelError,
    Reason,
    TransportError,
    make_error,
)
from gmem.uapi.flags import Faultability
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, SIZE_1G, SIZE_2M, Gfn, PgOff, PgRange
from tests.support import gmem_bytes
from tests.support.clock import Clock
from tests.support.gmem_table import Table, check_views
from tests.support.gmem_task import Task as Task  # noqa: PLC0414 - tests know it from here
from tests.support.rows import apply

T = TypeVar("T")
OperationError: TypeAlias = KernelError | TransportError
STEPS_MAX = 2_000_000
VM = "hosts/h/vms/a"
EIO = "EIO"


@dataclass(frozen=True)
class Snapshot:
    """Everything a test can compare: inodes, host memory, page states."""

    inodes: tuple[InodeStatistics, ...]
    memory: allocator.HostStatistics
    views: dict[int, tuple[bytes, bytes]]


class GmemWorld:
    """One host: an allocator, the core under test, tables, a store, mappings."""

    def __init__(
        self,
        *,
        huge_1g: int = 4,
        huge_2m: int = 16,
        base_pages: int = 1 << 16,
        nodes: int = 1,
    ) -> None:
        pools = [
            allocator.BootPool(SIZE_1G, huge_1g),
            allocator.BootPool(SIZE_2M, huge_2m),
        ]
        nr_pages = (huge_1g << 18) + (huge_2m << 9) + base_pages
        self.memory = HostMemory([nr_pages] * nodes, pools)
        self.core = GuestMemfdCore()
        self.clock = Clock()
        self.tables: dict[int, Table] = {}
        self.store: dict[int, object] = {}
        self.mappings: dict[int, list[HostMapping]] = {}
        self.descriptors: dict[str, object] = {}
        # Pages whose bytes are in a mapping and not stored yet; a test says which.
        self.dirty: set[tuple[int, ViewKind, int]] = set()
        self.log: list[Effect[Any]] = []
        self.rows: dict[str, Any] = {}
        # What was scheduled and nobody has run yet.
        self.work: list[int] = []
        self._faults: dict[type[Effect[Any]], list[OperationError | None]] = (
            defaultdict(list)
        )

    # Running.

    def task(self, op: Op[T]) -> Task[T]:
        return Task(self, op)

    def run(self, op: Op[T]) -> T:
        return Task(self, op).finish()

    def fail_next(
        self,
        kind: type[Effect[Any]],
        error: Reason | TransportError,
        *,
        after: int = 0,
    ) -> None:
        """Have the next effect of a kind raise, or the one `after` so many."""
        made = make_error(error, "injected") if isinstance(error, Reason) else error
        self._faults[kind] += [None] * after + [made]

    def perform(self, effect: Effect[Any]) -> Any:
        self.log.append(effect)
        if type(effect) in self.clock.answers:
            return self.clock.answers[type(effect)](effect)
        planned = self._faults.get(type(effect))
        error = planned.pop(0) if planned else None
        if error is not None:
            raise error
        return self._do(effect)

    def asked(self, kind: type[T]) -> list[T]:
        """The effects of a kind so far."""
        return [effect for effect in self.log if isinstance(effect, kind)]

    # Short words for what tests do all the time.

    def create(
        self, size: int, page_size: int = PAGE_SIZE, vm: str = VM, **options: Any
    ) -> Inode:
        made = InodeOptions(size=size, page_size=page_size, vm=vm, **options)
        return self.core.inode(self.run(self.core.create(made)))

    def created_v2(
        self, size: int, page_size: int = PAGE_SIZE, *, shared: bool = True
    ) -> Inode:
        """An inode of RFC_V2 that supports shared pages, bound as `bound` does."""
        inode = self.create(
            size,
            page_size,
            lineage=Lineage.RFC_V2,
            support_shared=True,
            init_private=not shared,
        )
        self.run(self.bind(inode))
        return inode

    def created_in_place(
        self, size: int, page_size: int = PAGE_SIZE, *, shared: bool = True
    ) -> Inode:
        """An inode of IN_PLACE that can be mapped, bound, all of it of one kind."""
        inode = self.create(size, page_size, lineage=Lineage.IN_PLACE, mmap=True)
        self.run(self.bind(inode))
        self.run(self.convert(whole(inode), shared=shared))
        return inode

    def run_work(self) -> None:
        """Run what was scheduled."""
        while self.work:
            self.run(self.core.merge(self.work.pop(0)))

    def bound(
        self, size: int, page_size: int = PAGE_SIZE, *, shared: bool = True
    ) -> Inode:
        """An inode that is bound as a whole to slot 0, from guest frame 0x100000."""
        inode = self.create(size, page_size)
        self.run(self.bind(inode, shared=shared))
        return inode

    def bind(
        self,
        inode: Inode,
        *,
        shared: bool = True,
        slot: int = 0,
        offset: int = 0,
        size: int | None = None,
        vm: str = VM,
    ) -> Op[None]:
        return self.core.bind(
            inode.number,
            vm,
            slot,
            base_gfn=Gfn(0x100000 + (offset >> PAGE_SHIFT)),
            offset=offset,
            size=inode.i_size - offset if size is None else size,
            host_faultable=shared,
            vmm_target=f"unix:{vm}",
        )

    def convert(
        self,
        *targets: ByteRange,
        shared: bool,
        validate_only: bool = False,
        wait_ms: int | None = None,
    ) -> Op[None]:
        to = Faultability.ALL if shared else Faultability.GUEST
        return self.core.convert(
            targets, to, validate_only=validate_only, wait_ms=wait_ms
        )

    def get_pfn(self, inode: Inode, pgoff: int, slot: int = 0) -> Op[Any]:
        return self.core.get_pfn(inode.number, VM, slot, Gfn(0x100000 + pgoff))

    def fault(self, inode: Inode, pgoff: int) -> Op[Any]:
        return self.core.host_fault(inode.number, PgOff(pgoff))

    # The data plane.

    def read(self, inode: Inode, view: ViewKind, pgoff: int) -> object:
        """What a load sees: a value, or EIO where it dies or is retried."""
        table = self.tables[inode.number]
        if table.views[view][pgoff] != PageState.OPEN:
            return EIO
        if table.pfn_of(pgoff) is None and view is ViewKind.HOST:
            self.run(self.fault(inode, pgoff))
        pfn = table.pfn_of(pgoff)
        if pfn is None:
            return EIO
        if not table.uptodate[pgoff]:
            self.store[pfn] = 0
            table.uptodate[pgoff] = 1
        return self.store.get(pfn, 0)

    def write(self, inode: Inode, view: ViewKind, pgoff: int, value: object) -> None:
        """Store a value in a page that the view can reach."""
        assert self.read(inode, view, pgoff) != EIO, (view, pgoff)
        pfn = self.tables[inode.number].pfn_of(pgoff)
        assert pfn is not None
        self.store[pfn] = value

    # Looking.

    def snapshot(self) -> Snapshot:
        views = {
            number: (bytes(t.views[ViewKind.HOST]), bytes(t.views[ViewKind.GUEST]))
            for number, t in self.tables.items()
        }
        return Snapshot(
            self.core.statistics(), self.memory.statistics().levels(), views
        )

    def check(self) -> None:
        """Assert the core's invariants and that the table agrees with the core."""
        self.core.check_all()
        self.memory.check_frames()
        assert sorted(self.tables) == self.core.numbers
        for number, table in self.tables.items():
            inode = self.core.inode(number)
            check_views(inode, table)
            unattached = set(inode.filemap.unattached(inode.whole))
            attached = {
                index >> inode.order: inode.filemap.get(index)
                for index in inode.filemap.present(inode.whole)
                if index not in unattached
            }
            frames = {unit: e.folio.pfn for unit, e in attached.items() if e}
            assert frames == table.frames

    # Effects.

    @singledispatchmethod
    def _do(self, effect: Effect[Any]) -> Any:
        raise AssertionError(effect)

    @_do.register
    def _(self, e: Release) -> None:
        e.lock.release(e.ticket)

    @_do.register
    def _(self, e: fx.Reserve) -> int:
        charging = allocator.Charging(e.cgroup, e.charge_rsvd)
        return self.memory.reserve(
            e.page_size, e.num_pages, owner=e.owner, charging=charging
        )

    @_do.register
    def _(self, e: fx.CountNodes) -> int:
        return len(self.memory.statistics().nodes)

    @_do.register
    def _(self, e: fx.Allocate) -> tuple[Folio, ...]:
        policy = allocator.MemPolicy(
            allocator.MemPolicyMode(e.mempolicy.mode.value), e.mempolicy.nodes
        )
        folios = self.memory.allocate(e.handle, policy, e.page_size, e.nr_folios)
        return tuple(Folio(f.pfn, f.order, f.node) for f in folios)

    @_do.register
    def _(self, e: fx.Split) -> int:
        return self.memory.split(e.handle, _theirs(e.folio))

    @_do.register
    def _(self, e: fx.Reconstruct) -> int:
        first = allocator.Folio(e.folio.pfn, 0, e.folio.node)
        return self.memory.reconstruct(e.handle, first, 1 << e.folio.order)[1]

    @_do.register
    def _(self, e: fx.Free) -> None:
        self.memory.free(e.handle, [_theirs(folio) for folio in e.folios])

    @_do.register
    def _(self, e: fx.Unreserve) -> None:
        self.memory.unreserve(e.handle)

    @_do.register
    def _(self, e: fx.PoisonFrame) -> None:
        self.memory.inject(e.pfn)

    @_do.register
    def _(self, e: fx.UnpoisonFrame) -> None:
        self.memory.unpoison(e.pfn)

    @_do.register
    def _(self, e: fx.ListErrors) -> dict[int, int]:
        frames = self.memory.poisoned_frames()
        return {f.pfn: f.nr_pages for f in frames if f.handle == e.handle}

    @_do.register
    def _(self, e: fx.ScheduleMerge) -> None:
        self.work.append(e.number)

    @_do.register(fx.InvalidateBegin)
    @_do.register(fx.InvalidateEnd)
    @_do.register(fx.WriteBackView)
    @_do.register(fx.DrainLru)
    def _(self, e: Any) -> None:
        """A VMM that acknowledges; a store without a cache; no holds of a moment."""

    @_do.register
    def _(self, e: fx.Record) -> None:
        # Written down as JSON, at once: the core may not change it afterwards.
        apply(self.rows, json.loads(json.dumps(e.changes)))

    @_do.register
    def _(self, e: fx.AddInode) -> None:
        nr_pages = e.i_size >> PAGE_SHIFT
        order = e.page_size.bit_length() - 1 - PAGE_SHIFT
        views = {view: bytearray(nr_pages) for view in ViewKind}
        self.tables[e.inode] = Table(order, views, bytearray(nr_pages))

    @_do.register
    def _(self, e: fx.RemoveInode) -> None:
        del self.tables[e.inode]

    @_do.register
    def _(self, e: fx.SetViewState) -> None:
        self.tables[e.inode].views[e.view][_slice(e.pages)] = bytes([e.state]) * len(
            e.pages
        )

    @_do.register
    def _(self, e: fx.InvalidateView) -> bool:
        states = self.tables[e.inode].views[e.view][_slice(e.pages)]
        assert PageState.OPEN not in states, "a READ could be parked in it"
        if e.view is ViewKind.HOST:
            self._unmap(e.inode, e.pages)
        dirty = {p for i, v, p in self.dirty if (i, v) == (e.inode, e.view)}
        dirty &= set(e.pages)
        self.dirty -= {(e.inode, e.view, pgoff) for pgoff in dirty}
        return bool(dirty)

    @_do.register
    def _(self, e: fx.QuiesceView) -> None:
        states = self.tables[e.inode].views[ViewKind.HOST]
        span = _slice(e.pages)
        quiet = bytes(
            [PageState.QUIESCED if s == PageState.OPEN else s for s in range(4)]
        )
        states[span] = states[span].translate(quiet + bytes(range(4, 256)))
        self._unmap(e.inode, e.pages)

    @_do.register
    def _(self, e: fx.LoadBytes) -> bytes:
        return gmem_bytes.load(self, e)

    @_do.register
    def _(self, e: fx.StoreBytes) -> None:
        gmem_bytes.store(self, e)

    @_do.register
    def _(self, e: fx.FindMappings) -> tuple[HostMapping, ...]:
        return tuple(self.mappings.get(e.inode, ()))

    @_do.register
    def _(self, e: fx.ReadDescriptor) -> None:
        value = self.descriptors[e.descriptor]
        for pgoff in e.pages:
            self.store[self.frame(e.inode, pgoff)] = value

    @_do.register
    def _(self, e: fx.AttachFolio) -> None:
        table = self.tables[e.inode]
        for number in range(e.nr_folios):
            unit = (e.index >> table.order) + number
            assert unit not in table.frames, unit
            table.frames[unit] = e.pfn + (number << table.order)

    @_do.register
    def _(self, e: fx.DetachFolio) -> None:
        table = self.tables[e.inode]
        for number in range(e.nr_folios):
            del table.frames[(e.index >> table.order) + number]

    @_do.register
    def _(self, e: fx.ClearUptodate) -> None:
        self.tables[e.inode].uptodate[_slice(e.pages)] = bytes(len(e.pages))

    @_do.register
    def _(self, e: fx.SetUptodate) -> None:
        self.tables[e.inode].uptodate[_slice(e.pages)] = b"\1" * len(e.pages)

    @_do.register
    def _(self, e: fx.IsUptodate) -> bool:
        return any(self.tables[e.inode].uptodate[_slice(e.pages)])

    @_do.register
    def _(self, e: fx.Prepare) -> None:
        table = self.tables[e.inode]
        for pgoff in e.pages:
            pfn = table.pfn_of(pgoff)
            if pfn is not None and not table.uptodate[pgoff]:
                self.store[pfn] = 0
                table.uptodate[pgoff] = 1

    @_do.register
    def _(self, e: fx.ZeroPages) -> None:
        table = self.tables[e.inode]
        frames = (table.pfn_of(pgoff) for pgoff in e.pages)
        for pfn in frames:
            if pfn is not None:
                self.store[pfn] = 0

    def frame(self, number: int, pgoff: int) -> int:
        pfn = self.tables[number].pfn_of(pgoff)
        assert pfn is not None, (number, pgoff)
        return pfn

    def _unmap(self, number: int, pages: PgRange) -> None:
        """A mapping of one page goes when the page is invalidated."""
        self.mappings[number] = [
            mapping
            for mapping in self.mappings.get(number, [])
            if not PgRange.of_bytes(mapping.offset, mapping.size).overlaps(pages)
        ]


@contextmanager
def refused(
    world: GmemWorld, reason: Reason
) -> Iterator[pytest.ExceptionInfo[KernelError]]:
    """Expect a refusal for `reason`, and that nothing moved."""
    before = world.snapshot()
    with pytest.raises(KernelError) as caught:
        yield caught
    assert caught.value.reason is reason
    assert world.snapshot() == before
    world.check()


def whole(inode: Inode) -> ByteRange:
    """All bytes of an inode."""
    return ByteRange(inode.number, 0, inode.i_size)


def part(inode: Inode, first_page: int, nr_pages: int = 1) -> ByteRange:
    """Some pages of an inode."""
    return ByteRange(inode.number, first_page << PAGE_SHIFT, nr_pages << PAGE_SHIFT)


def mapped(pgoff: int, *, pid: int = 4711, comm: str = "loader") -> HostMapping:
    """One page that a process has mapped."""
    return HostMapping(pid, comm, pgoff << PAGE_SHIFT, PAGE_SIZE)


def _theirs(folio: Folio) -> allocator.Folio:
    return allocator.Folio(folio.pfn, folio.order, folio.node)


def _slice(pages: PgRange) -> slice:
    return slice(pages.start, pages.stop)
