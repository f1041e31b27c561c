"""What a memory error does to an inode (memory_failure(), kvm_gmem_error_folio()).

    1. the page is marked: from now on nobody is handed it.
    2. every VM that was handed something of the folio zaps it, and both views lose it.
    3. nothing is truncated: the page stays in the filemap, poisoned, until it is
       punched, evicted or unpoisoned.

The kernel holds the invalidate_lock shared for that. Here it is held exclusively: who
changes what the views show must be alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from gmem.effects import Op, perform
from gmem.guest_memfd.core.effects import (
    FindMappings,
    InvalidateEnd,
    PoisonFrame,
    UnpoisonFrame,
)
from gmem.guest_memfd.core.exposure import show, withdraw_value
from gmem.guest_memfd.core.folios import get_folio
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.invalidation import invalidate_begin, invalidate_end
from gmem.guest_memfd.core.poison import affected, errors_of_unit
from gmem.uapi.errors import (
    OPERATION_ERRORS,
    Errno,
    NoSuchObject,
    Poisoned,
    Reason,
)
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import Pfn, PgRange


class KillPolicy(Enum):
    """Who is told by SIGBUS: as the series does it, or as PR_MCE_KILL says.

    The latter two are those of the series that makes memory_failure() respect it.
    """

    DEFAULT = "default"
    EARLY = "early"
    LATE = "late"


@dataclass(frozen=True, slots=True)
class MemoryFailure:
    """What became of an error: frame, pages lost, memory_failure()'s result.

    `signalled` are the processes that the kernel sends SIGBUS at once; `dirty` says
    whether the page had bytes that were not stored yet.
    """

    pfn: Pfn
    pages: PgRange
    errno: int
    mapped: tuple[str, ...]
    signalled: tuple[str, ...]
    dirty: bool


MemoryFailurePolicy: TypeAlias = Callable[
    [tuple[str, ...]], tuple[int, tuple[str, ...]]
]
"""Errno and who is signalled, given who has the page mapped."""


def delayed_is_failed(mapped: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    """As today: MF_DELAYED becomes MF_FAILED, and whoever has it mapped is killed."""
    return int(Errno.EBUSY), mapped


def inject(inode: Inode, pgoff: int, kill: KillPolicy) -> Op[MemoryFailure]:
    """Give the frame of a page a memory error, and do what follows from it.

    NoSuchObject (FOLIO_UNKNOWN) for a hole, Poisoned (PAGE_POISONED) where there is
    an error already; then nothing was changed.
    """
    bad = PgRange(pgoff, pgoff + 1)
    yield from _settle(inode, pgoff)
    held = yield from inode.folio_locks.take(inode.unit_of(pgoff))
    try:
        pfn = _require_healthy(inode, pgoff)
        mapped = yield from _mapped(inode, affected(inode, bad))
        yield from perform(PoisonFrame(pfn))
        pages, dirty = yield from _take_away(inode, bad)
    finally:
        yield from inode.folio_locks.give(held)
    errno, signalled = inode.rules.memory_failure(mapped)
    if kill is not KillPolicy.DEFAULT:
        early = kill is KillPolicy.EARLY
        errno, signalled = 0, mapped if early and dirty else ()
    return MemoryFailure(pfn, pages, errno, mapped, signalled, dirty)


def hear(inode: Inode, bad: PgRange, errors: Mapping[int, int]) -> Op[None]:
    """Do what follows from an error in `bad` that somebody else has found.

    `errors` says of which frames (see `pages_with_errors`).
    """
    for index in bad.huge_starts(inode.order):
        yield from _hear_unit(inode, bad.intersection(inode.unit_of(index)), errors)


def unpoison(inode: Inode, pgoff: int) -> Op[Pfn]:
    """Forget the error of a page; its bytes are those of before.

    NoSuchObject (FRAME_UNKNOWN) where it has none.
    """
    entry = inode.filemap.get(inode.unit_of(pgoff).start)
    if entry is None or pgoff not in inode.poisoned:
        raise NoSuchObject(
            Reason.FRAME_UNKNOWN,
            f"the page at offset {PgRange(pgoff, pgoff).offset:#x} of inode "
            f"{inode.number} has no memory error: there is nothing to forget",
            inode=inode.number,
        )
    pfn = Pfn(entry.folio.pfn + pgoff - inode.unit_of(pgoff).start)
    yield from perform(UnpoisonFrame(pfn))
    yield from forget(inode, PgRange(pgoff, pgoff + 1))
    return pfn


def forget(inode: Inode, healed: PgRange) -> Op[None]:
    """Show pages again whose errors are gone, and what was lost with them."""
    for index in healed.huge_starts(inode.order):
        part = healed.intersection(inode.unit_of(index))
        back = affected(inode, part)
        inode.poisoned.discard(part)
        yield from show(inode, back)


def _hear_unit(inode: Inode, bad: PgRange, errors: Mapping[int, int]) -> Op[None]:
    try:
        yield from _settle(inode, bad.start)
    except OPERATION_ERRORS:
        # It could not be split and is gone, or the allocator does not answer.
        return
    unit = inode.unit_of(bad.start)
    held = yield from inode.folio_locks.take(unit)
    try:
        # A guest fault without the lock may have brought another folio meanwhile.
        for part in errors_of_unit(inode, unit.start, errors):
            if not inode.poisoned.all_in(part):
                yield from _take_away(inode, part)
    finally:
        yield from inode.folio_locks.give(held)


def _settle(inode: Inode, pgoff: int) -> Op[None]:
    """Have a folio that a fault is about to attach attached."""
    entry = inode.filemap.get(inode.unit_of(pgoff).start)
    if entry is not None and not entry.attached:
        yield from get_folio(inode, pgoff)


def _require_healthy(inode: Inode, pgoff: int) -> Pfn:
    index = inode.unit_of(pgoff).start
    entry = inode.filemap.get(index)
    offset = PgRange(pgoff, pgoff).offset
    if entry is None:
        raise NoSuchObject(
            Reason.FOLIO_UNKNOWN,
            f"the page at offset {offset:#x} of inode {inode.number} is a hole: "
            "allocate it first",
            inode=inode.number,
        )
    if pgoff in inode.poisoned:
        raise Poisoned(
            Reason.PAGE_POISONED,
            f"the page at offset {offset:#x} of inode {inode.number} has a memory "
            "error already: unpoison it, or take another",
            error_offset=offset,
            inode=inode.number,
        )
    return Pfn(entry.folio.pfn + pgoff - index)


def _mapped(inode: Inode, pages: PgRange) -> Op[tuple[str, ...]]:
    if not inode.faultability.any_in(pages, Faultability.ALL):
        return ()
    mappings = yield from perform(FindMappings(inode.number, pages))
    return tuple(dict.fromkeys(mapping.holder for mapping in mappings))


def _take_away(inode: Inode, bad: PgRange) -> Op[tuple[PgRange, bool]]:
    """Mark pages and take all that is lost with them from VMs and views.

    Returns that, and whether bytes came back that were not stored yet.
    """
    inode.poisoned.add(bad)
    pages = affected(inode, bad)
    begun: list[InvalidateEnd] = []
    dirty = False
    try:
        yield from invalidate_begin(inode, pages, begun)
        for value in Faultability:
            dirty |= yield from withdraw_value(inode, pages, value)
    finally:
        yield from show(inode, pages)
        yield from invalidate_end(begun)
    return pages, dirty
