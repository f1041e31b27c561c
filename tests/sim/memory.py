"""The data plane as a model: page states, one tag for the bytes of a page, mappings.

A write leaves a *tag*: which page of which inode it was meant for, through which view,
and when. Whoever reads a tag that was not meant for it has seen what it must not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from gmem.effects import Effect
from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.values import HostMapping, PageState, ViewKind
from gmem.uapi.pages import PAGE_SIZE, PgRange, order_of
from tests.sim.world import World


class Tag(NamedTuple):
    """The bytes of one page: what they were written for."""

    inode: int
    pgoff: int
    view: ViewKind
    time: int


class Access(Enum):
    """What becomes of a load or store in a view (rule V4)."""

    SERVED = "served"
    HOLE = "hole"
    WAIT = "wait"
    REFUSED = "refused"


@dataclass(slots=True, eq=False)
class Mix:
    """Pages whose tags may cross from view to view: the series does not zero them.

    After a failed conversion (its rollback overwrites faultability, contents stay) and
    after a bind. `until` is None while it is not known how the conversion ends.
    """

    inode: int
    pages: PgRange
    until: int | None = None


@dataclass(slots=True)
class Table:
    """The page states of one inode, its frames by unit, who has it mapped."""

    order: int
    views: tuple[bytearray, bytearray]
    uptodate: bytearray
    frames: dict[int, int] = field(default_factory=dict)
    # (who, page) -> frame, per view
    mapped: tuple[dict[tuple[str, int], int], dict[tuple[str, int], int]] = field(
        default_factory=lambda: ({}, {})
    )

    def frame_of(self, pgoff: int) -> int | None:
        index = pgoff >> self.order << self.order
        first = self.frames.get(index)
        return None if first is None else first + pgoff - index


class Memory:
    """All tables and bytes; answers the LOCAL and BLOCKING effects of guest_memfd."""

    def __init__(self, world: World) -> None:
        self.tables: dict[int, Table] = {}
        self.tags: dict[int, Tag] = {}
        self.mixes: list[Mix] = []
        # The last bytes of a page, where they must outlive conversions.
        self.written: dict[tuple[int, int], Tag] = {}
        self._punches: list[tuple[int, PgRange]] = []
        # What punches that are over have destroyed.
        self.punched: dict[Tag, None] = {}
        self._world = world
        world.performers.local.update(
            {
                fx.AddInode: self._add_inode,
                fx.Record: lambda _effect: None,
                fx.SetViewState: self._set_view_state,
                fx.AttachFolio: self._attach,
                fx.DetachFolio: self._detach,
                fx.ClearUptodate: self._clear_uptodate,
                fx.SetUptodate: self._set_uptodate,
                fx.IsUptodate: self._is_uptodate,
                fx.Prepare: self._prepare,
                fx.ZeroPages: self._zero,
            }
        )
        self.blocking: dict[type[Effect[Any]], Callable[[Any], object]] = {
            fx.InvalidateView: self._invalidate_view,
            fx.QuiesceView: self._quiesce_view,
            fx.WriteBackView: lambda _effect: None,
            fx.LoadBytes: self._load,
            fx.StoreBytes: self._store,
            fx.RemoveInode: self._remove_inode,
            fx.FindMappings: self._find_mappings,
            fx.ReadDescriptor: self._read_descriptor,
        }

    # Loads and stores.

    def access(
        self, who: str, inode: int, view: ViewKind, pgoff: int, *, write: bool
    ) -> Access:
        """Do one access through a mapping of a view, faulting the page in first."""
        table = self.tables.get(inode)
        if table is None:
            return Access.REFUSED
        frame = table.mapped[view].get((who, pgoff))
        if frame is None:
            outcome = self._fault(table, who, view, pgoff)
            if outcome is not Access.SERVED:
                return outcome
            frame = table.mapped[view][who, pgoff]
        # A store is one of a load and an increment: both see what was there.
        self._require_meant(self.tags.get(frame), inode, pgoff, view)
        self._require_kept(self.tags.get(frame), inode, pgoff)
        if write:
            self._write(frame, Tag(inode, pgoff, view, self._world.now))
        return Access.SERVED

    def _write(self, frame: int, tag: Tag) -> None:
        self.tags[frame] = tag
        punched = any(
            tag.inode == inode and tag.pgoff in pages for inode, pages in self._punches
        )
        if self._world.play.keeps_content and not punched:
            self.written[tag.inode, tag.pgoff] = tag

    def _require_kept(self, tag: Tag | None, inode: int, pgoff: int) -> None:
        """Check that no conversion has lost the last bytes of a page."""
        last = self.written.get((inode, pgoff))
        if last is not None and tag != last:
            self._world.broken(f"{last} is lost: {inode}, {pgoff:#x} shows {tag}")

    def _fault(self, table: Table, who: str, view: ViewKind, pgoff: int) -> Access:
        state = PageState(table.views[view][pgoff])
        if state is PageState.QUIESCED:
            return Access.WAIT
        if state is not PageState.OPEN:
            return Access.REFUSED
        frame = table.frame_of(pgoff)
        if frame is None:
            return Access.HOLE if view is ViewKind.HOST else Access.REFUSED
        if not table.uptodate[pgoff]:
            self.tags.pop(frame, None)
            table.uptodate[pgoff] = 1
        table.mapped[view][who, pgoff] = frame
        return Access.SERVED

    def _require_meant(
        self, tag: Tag | None, inode: int, pgoff: int, view: ViewKind
    ) -> None:
        """Check that what is read is zero, or was written for this page and view."""
        if tag is None:
            return
        meant = (tag.inode, tag.pgoff) == (inode, pgoff)
        if not meant or (tag.view is not view and not self._may_cross(tag)):
            self._world.broken(
                f"{view.name} view of inode {inode}, page {pgoff:#x}, shows {tag}"
            )

    def _may_cross(self, tag: Tag) -> bool:
        return self._world.play.keeps_content or any(
            mix.inode == tag.inode
            and tag.pgoff in mix.pages
            and (mix.until is None or mix.until >= tag.time)
            for mix in self.mixes
        )

    @contextmanager
    def punching(self, inode: int, pages: PgRange) -> Iterator[None]:
        """While this lasts the pages may lose their bytes at any moment."""
        punch = inode, pages
        self._punches.append(punch)
        for key in [k for k in self.written if k[0] == inode and k[1] in pages]:
            del self.written[key]
        try:
            yield
        finally:
            self._punches.remove(punch)

    def is_punched(self, inode: int, pages: PgRange) -> bool:
        """Tell whether somebody is punching some of `pages`."""
        return any(
            number == inode and part.overlaps(pages) for number, part in self._punches
        )

    def note_hole(self, inode: int, pages: PgRange, before: int) -> None:
        """Note that a punch is over: no byte written before it began may be seen."""
        for tag in self.tags.values():
            if tag.inode == inode and tag.pgoff in pages and tag.time < before:
                self.punched[tag] = None

    def readable(self) -> Iterator[tuple[int, int, Tag]]:
        """Yield inode and page of every tag that a load of the page would see."""
        units = {
            frame: (number, table, index)
            for number, table in self.tables.items()
            for index, frame in table.frames.items()
        }
        order = max((table.order for table in self.tables.values()), default=0)
        for frame, tag in self.tags.items():
            first = frame >> order << order
            if first in units:
                number, table, index = units[first]
                pgoff = index + frame - first
                if table.uptodate[pgoff]:
                    yield number, pgoff, tag

    def drop_mappings(self, who: str, inode: int, pages: PgRange) -> None:
        """MADV_DONTNEED or munmap by one process."""
        table = self.tables.get(inode)
        if table is not None:
            for view in ViewKind:
                _drop(table.mapped[view], pages, who)

    def drop_process(self, who: str) -> None:
        """End a process: nothing of it is mapped any more."""
        for inode, table in self.tables.items():
            self.drop_mappings(who, inode, PgRange(0, len(table.uptodate)))

    # Effects.

    def _add_inode(self, effect: fx.AddInode) -> None:
        nr_pages = effect.i_size // PAGE_SIZE
        views = bytearray(nr_pages), bytearray(nr_pages)
        order = order_of(effect.page_size)
        self.tables[effect.inode] = Table(order, views, bytearray(nr_pages))

    def _set_view_state(self, effect: fx.SetViewState) -> None:
        pages = effect.pages
        states = self.tables[effect.inode].views[effect.view]
        if effect.state is PageState.OPEN:
            self._require_closed(effect.inode, ViewKind(1 - effect.view), pages)
        states[pages.start : pages.stop] = bytes([effect.state]) * len(pages)

    def _require_closed(self, inode: int, other: ViewKind, pages: PgRange) -> None:
        """Check that what one view is about to show, the other does not."""
        states = self.tables[inode].views[other][pages.start : pages.stop]
        for state in (PageState.OPEN, PageState.QUIESCED):
            if state in states:
                self._world.broken(f"inode {inode}: {pages} is open in both views")

    def _attach(self, effect: fx.AttachFolio) -> None:
        table = self.tables[effect.inode]
        for number in range(effect.nr_folios):
            index = effect.index + (number << table.order)
            assert index not in table.frames, index
            table.frames[index] = effect.pfn + (number << table.order)

    def _detach(self, effect: fx.DetachFolio) -> None:
        table = self.tables[effect.inode]
        for number in range(effect.nr_folios):
            del table.frames[effect.index + (number << table.order)]

    def _clear_uptodate(self, effect: fx.ClearUptodate) -> None:
        pages = effect.pages
        uptodate = self.tables[effect.inode].uptodate
        uptodate[pages.start : pages.stop] = bytes(len(pages))

    def _set_uptodate(self, effect: fx.SetUptodate) -> None:
        pages = effect.pages
        uptodate = self.tables[effect.inode].uptodate
        uptodate[pages.start : pages.stop] = b"\x01" * len(pages)

    def _is_uptodate(self, effect: fx.IsUptodate) -> bool:
        pages = effect.pages
        return any(self.tables[effect.inode].uptodate[pages.start : pages.stop])

    def _prepare(self, effect: fx.Prepare) -> None:
        table = self.tables[effect.inode]
        for pgoff, frame in _frames(table, effect.pages):
            if not table.uptodate[pgoff]:
                self.tags.pop(frame, None)
                table.uptodate[pgoff] = 1

    def _zero(self, effect: fx.ZeroPages) -> None:
        table = self.tables[effect.inode]
        for index in effect.pages.huge_starts(table.order):
            first = table.frames.get(index)
            if first is None:
                continue
            unit = PgRange(index, index + (1 << table.order))
            part = unit.intersection(effect.pages).shifted(first - index)
            for frame in [frame for frame in self.tags if frame in part]:
                del self.tags[frame]

    def _invalidate_view(self, effect: fx.InvalidateView) -> bool:
        """Unmap pages; what was mapped counts as dirty."""
        return _drop(self.tables[effect.inode].mapped[effect.view], effect.pages)

    def _quiesce_view(self, effect: fx.QuiesceView) -> None:
        table, pages = self.tables[effect.inode], effect.pages
        states = table.views[ViewKind.HOST]
        quiet = states[pages.start : pages.stop].replace(
            bytes([PageState.OPEN]), bytes([PageState.QUIESCED])
        )
        states[pages.start : pages.stop] = quiet
        _drop(table.mapped[ViewKind.HOST], pages)

    def _load(self, effect: fx.LoadBytes) -> bytes:
        """Read pages as a mapping would; what they hold is checked, not returned."""
        table = self.tables[effect.inode]
        for pgoff in PgRange.around(effect.offset, effect.size):
            frame = table.frame_of(pgoff)
            assert frame is not None, (effect.inode, pgoff)
            self._prepare(fx.Prepare(effect.inode, PgRange(pgoff, pgoff + 1)))
            host = ViewKind.HOST
            tag = self.tags.get(frame)
            self._require_meant(tag, effect.inode, pgoff, host)
            self._require_kept(tag, effect.inode, pgoff)
        return bytes(effect.size)

    def _store(self, effect: fx.StoreBytes) -> None:
        table = self.tables[effect.inode]
        for pgoff in PgRange.around(effect.offset, len(effect.data)):
            if any(page == pgoff for _who, page in table.mapped[ViewKind.HOST]):
                self._world.broken(f"inode {effect.inode}: page {pgoff:#x} is mapped")
            self._load(fx.LoadBytes(effect.inode, pgoff * PAGE_SIZE, PAGE_SIZE))
            frame = table.frame_of(pgoff)
            assert frame is not None, (effect.inode, pgoff)
            tag = Tag(effect.inode, pgoff, ViewKind.HOST, self._world.now)
            self._write(frame, tag)

    def _remove_inode(self, effect: fx.RemoveInode) -> None:
        table = self.tables.pop(effect.inode)
        assert not any(table.mapped), (effect.inode, table.mapped)

    def _find_mappings(self, effect: fx.FindMappings) -> tuple[HostMapping, ...]:
        mapped = self.tables[effect.inode].mapped[ViewKind.HOST]
        return tuple(
            HostMapping(1, who, pgoff * PAGE_SIZE, PAGE_SIZE)
            for who, pgoff in mapped
            if pgoff in effect.pages and not is_guest(who)
        )

    def _read_descriptor(self, effect: fx.ReadDescriptor) -> None:
        for pgoff, frame in _frames(self.tables[effect.inode], effect.pages):
            tag = Tag(effect.inode, pgoff, ViewKind.GUEST, self._world.now)
            self._write(frame, tag)


def guest_process(vm: str) -> str:
    """Return what the guest process of a VM is called; FindMappings leaves it out."""
    return f"guest of {vm}"


def is_guest(who: str) -> bool:
    """Tell a guest process from a client."""
    return who.startswith("guest of ")


def _frames(table: Table, pages: PgRange) -> Iterator[tuple[int, int]]:
    for pgoff in pages:
        frame = table.frame_of(pgoff)
        if frame is not None:
            yield pgoff, frame


def _drop(
    mapped: dict[tuple[str, int], int], pages: PgRange, who: str | None = None
) -> bool:
    keys = [key for key in mapped if key[1] in pages and who in (None, key[0])]
    for key in keys:
        del mapped[key]
    return bool(keys)
