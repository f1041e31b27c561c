"""The effects that this process answers itself: page states, bytes, who maps what."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.values import HostMapping, ViewKind
from gmem.guest_memfd.page_states import InodeTable
from gmem.guest_memfd.remote_finder import Finder
from gmem.guest_memfd.views import Contents, Views
from gmem.runtime.broker import Broker, Session
from gmem.runtime.performer import Performer
from gmem.uapi.errors import BadRequest, Contended, InUse, KernelError, Reason
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SHIFT, PgRange

P = ParamSpec("P")
R = TypeVar("R")

# Looking into page tables waits for the other process's mmap_lock; see mappings.py.
SCAN_SECONDS_MAX = 2.0
# Looks into page tables, and reads of a client's descriptor, at once.
WORKERS = 8


@dataclass(frozen=True, slots=True)
class MappedSource:
    """How "mapped" is known, and the word for it in GetCapabilities."""

    finder: Finder | None

    @property
    def word(self) -> str:
        """`pagemap` where page tables can be read, `reported` where clients say it."""
        return "reported" if self.finder is None else "pagemap"


class TableKeeper(Protocol):
    """Who keeps page states where our death does not reach them."""

    def hold(self, table: InodeTable) -> None:
        """Keep those of a new inode."""

    def drop(self, ino: int) -> None:
        """Forget those of an inode that is gone."""


class MemoryPorts:
    """Answers the LOCAL and BLOCKING effects of the guest_memfd core.

    Tables live here from AddInode to RemoveInode; the session serves from the same.
    """

    def __init__(
        self,
        session: Views,
        contents: Contents,
        broker: Broker,
        keeper: TableKeeper,
        *,
        mapped: MappedSource,
        file_of: Callable[[int], str],
    ) -> None:
        self._session = session
        self._contents = contents
        self._broker = broker
        self._keeper = keeper
        self._mapped = mapped
        self._file_of = file_of
        self._tables: dict[int, InodeTable] = {}
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="look")

    def register(self, performer: Performer) -> None:
        """Enter every effect of this file in the table of who answers what."""
        blocking = partial(performer.register_blocking, workers=self._revokers)
        # What moves or frees bytes takes as long as there are bytes.
        moving = blocking if self._session.moves_bytes else performer.register_local
        performer.register_local(fx.AddInode, self._add_inode)
        moving(fx.SetViewState, self._set_view_state)
        performer.register_local(fx.AttachFolio, self._attach)
        performer.register_local(fx.DetachFolio, self._detach)
        moving(fx.ClearUptodate, self._clear_uptodate)
        performer.register_local(fx.SetUptodate, self._set_uptodate)
        performer.register_local(fx.IsUptodate, self._is_uptodate)
        performer.register_local(fx.Prepare, self._prepare)
        moving(fx.ZeroPages, self._zero)
        blocking(fx.InvalidateView, self._invalidate_view)
        blocking(fx.QuiesceView, self._quiesce_view)
        blocking(fx.WriteBackView, self._write_back)
        blocking(fx.LoadBytes, self._load)
        blocking(fx.StoreBytes, self._store_bytes)
        performer.register_remote(fx.RemoveInode, self._remove_inode)
        performer.register_remote(fx.FindMappings, self._find_mappings)
        performer.register_remote(fx.ReadDescriptor, self._read_descriptor)

    def _revokers(self) -> Executor:
        return self._session.revokers

    def close(self) -> None:
        """Let worker threads end; those asleep in the kernel are not waited for."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def adopt(self, table: InodeTable, *, host_mmap: bool, counts_blocks: bool) -> None:
        """Serve the views of an inode whose page states are there already."""
        self._tables[table.ino] = table
        self._session.add_inode(table, host_mmap=host_mmap, counts_blocks=counts_blocks)

    def _add_inode(self, effect: fx.AddInode) -> None:
        table = self._session.new_table(effect.inode, effect.i_size, effect.page_size)
        # Before anybody can open it: who stands in for us must know it.
        self._keeper.hold(table)
        self.adopt(
            table, host_mmap=effect.host_mmap, counts_blocks=effect.counts_blocks
        )

    def _set_view_state(self, effect: fx.SetViewState) -> None:
        pages = effect.pages
        self._session.set_state(
            effect.inode, effect.view, pages.start, pages.stop, effect.state
        )

    def _attach(self, effect: fx.AttachFolio) -> None:
        table = self._tables[effect.inode]
        step = 1 << table.order
        for number in range(effect.nr_folios):
            table.attach(effect.index + number * step, effect.pfn + number * step)

    def _detach(self, effect: fx.DetachFolio) -> None:
        table = self._tables[effect.inode]
        for number in range(effect.nr_folios):
            table.detach(effect.index + (number << table.order))

    def _clear_uptodate(self, effect: fx.ClearUptodate) -> None:
        self._contents.clear_uptodate(self._tables[effect.inode], effect.pages)

    def _set_uptodate(self, effect: fx.SetUptodate) -> None:
        table = self._tables[effect.inode]
        table.set_uptodate(effect.pages.start, effect.pages.stop)

    def _is_uptodate(self, effect: fx.IsUptodate) -> bool:
        return self._contents.is_uptodate(self._tables[effect.inode], effect.pages)

    def _prepare(self, effect: fx.Prepare) -> None:
        self._contents.prepare(self._tables[effect.inode], effect.pages)

    def _zero(self, effect: fx.ZeroPages) -> None:
        self._contents.zero(self._tables[effect.inode], effect.pages)

    def _invalidate_view(self, effect: fx.InvalidateView) -> bool:
        start, stop = effect.pages.start, effect.pages.stop
        return self._session.invalidate(effect.inode, effect.view, start, stop)

    def _quiesce_view(self, effect: fx.QuiesceView) -> None:
        pages = effect.pages
        self._session.quiesce(effect.inode, ViewKind.HOST, pages.start, pages.stop)

    def _write_back(self, effect: fx.WriteBackView) -> None:
        pages = effect.pages
        self._session.write_back(effect.inode, ViewKind.HOST, pages.start, pages.stop)

    def _load(self, effect: fx.LoadBytes) -> bytes:
        return self._session.load(effect.inode, effect.offset, effect.size)

    def _store_bytes(self, effect: fx.StoreBytes) -> None:
        host = ViewKind.HOST
        self._session.store(effect.inode, host, effect.offset, effect.data)

    async def _remove_inode(self, effect: fx.RemoveInode) -> None:
        await self._in_worker(self._session.remove_inode, effect.inode)
        self._keeper.drop(effect.inode)
        self._tables.pop(effect.inode).close()

    async def _find_mappings(self, effect: fx.FindMappings) -> tuple[HostMapping, ...]:
        if self._session.open_count(effect.inode, ViewKind.HOST) == 0:
            return ()
        finder = self._mapped.finder
        if finder is None:
            return self._reported(effect, self._broker.sessions)
        st_ino = self._session.st_ino(effect.inode, ViewKind.HOST)
        try:
            runs = await asyncio.wait_for(
                self._in_worker(finder.find, st_ino, [effect.pages]), SCAN_SECONDS_MAX
            )
        except TimeoutError:
            raise Contended(
                Reason.PAGE_IN_USE,
                f"the page tables of the processes could not be read within "
                f"{SCAN_SECONDS_MAX:.0f} s: one of them waits in a fault; try again",
                lineage=Lineage.RFC_V1,
                error_offset=effect.pages.offset,
            ) from None
        self._require_seen(effect, finder)
        seen = tuple(
            HostMapping(run.pid, run.comm, run.pages.offset, run.pages.size)
            for run in runs
        )
        # Clients of other pid namespaces are in no /proc that is looked into.
        foreign = [session for session in self._broker.sessions if session.pid == 0]
        return seen + self._reported(effect, foreign)

    def _require_seen(self, effect: fx.FindMappings, finder: Finder) -> None:
        """Refuse where a client of ours cannot be looked into."""
        unseen = finder.hidden & {session.pid for session in self._broker.sessions}
        if unseen:
            pid = min(unseen)
            raise Contended(
                Reason.PAGE_IN_USE,
                f"pid {pid} is connected and has more privileges than this service, "
                "which cannot see what it maps: end it, or run the service with as "
                "many",
                lineage=Lineage.RFC_V1,
                error_offset=effect.pages.offset,
                holders=f"pid {pid}",
            )

    def _reported(
        self, effect: fx.FindMappings, sessions: Iterable[Session]
    ) -> tuple[HostMapping, ...]:
        file = self._file_of(effect.inode)
        found: list[HostMapping] = []
        for session in sessions:
            for window in session.windows:
                if window.file == file and window.length:
                    found += _within(session, window.offset, window.length, effect)
        return tuple(found)

    async def _read_descriptor(self, effect: fx.ReadDescriptor) -> None:
        given = self._broker.descriptor(effect.descriptor)
        # The giver may end meanwhile: the broker then closes its descriptor.
        fd = os.dup(given.fd)
        try:
            await self._in_worker(self._copy_in, fd, effect)
        finally:
            await self._in_worker(os.close, fd)

    def _copy_in(self, fd: int, effect: fx.ReadDescriptor) -> None:
        found = os.fstat(fd)
        if self._session.is_view(found.st_dev, found.st_ino):
            raise BadRequest(
                Reason.DESCRIPTOR_TYPE,
                f"{effect.descriptor} is a view of a guest_memfd: give a memfd or a "
                "file with the bytes",
            )
        table = self._tables[effect.inode]
        try:
            self._contents.copy_in(table, effect.pages, fd, effect.offset)
        except (OSError, KernelError) as error:
            raise _unreadable(effect, fd, error) from error

    async def _in_worker(
        self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, lambda: work(*args, **kwargs))


def _within(
    session: Session, offset: int, length: int, effect: fx.FindMappings
) -> list[HostMapping]:
    first, last = offset >> PAGE_SHIFT, -(-(offset + length) >> PAGE_SHIFT)
    part = PgRange(first, last).intersection(effect.pages)
    if not len(part):
        return []
    # In another pid namespace only what it calls itself is known of it.
    comm = session.comm or session.client
    return [HostMapping(session.pid, comm, part.offset, part.size)]


def _unreadable(effect: fx.ReadDescriptor, fd: int, error: Exception) -> KernelError:
    size = os.fstat(fd).st_size
    if stat.S_ISREG(os.fstat(fd).st_mode) and size < effect.offset + effect.pages.size:
        return InUse(
            Reason.PAGE_UNREADABLE,
            f"{effect.descriptor} has {size} bytes and "
            f"{effect.offset + effect.pages.size} are wanted: give a longer one",
            available=size,
        )
    return BadRequest(
        Reason.DESCRIPTOR_TYPE, f"{effect.descriptor} cannot be read: {error}"
    )
