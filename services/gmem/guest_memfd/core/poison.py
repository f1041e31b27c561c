"""Which pages of an inode nobody may use, because of memory errors in their folios.

An error is in a page. A whole huge folio with one is lost as a whole, as the kernel's
flag is on its head; a split one loses the page alone (see docs/adr/0021). Such pages
are CLOSED in both views, whatever their faultability, so that whoever judges a READ by
the page states, the keeper's stand-in too, refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping

from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.page_set import PageSet
from gmem.uapi.errors import Poisoned, Reason
from gmem.uapi.pages import PgRange


def affected(inode: Inode, bad: PgRange) -> PgRange:
    """Return the pages that nobody may use because of an error in `bad`, of one unit.

    All of a whole folio, of a split one only the bad pages; also of one that no view
    shows and whoever comes next splits.
    """
    unit = inode.unit_of(bad.start)
    entry = inode.filemap.get(unit.start)
    if entry is None or entry.split:
        return bad
    will_split = not entry.attached and inode.wants_split(unit.start)
    return bad if will_split else unit


def unusable(inode: Inode, pages: PgRange) -> list[PgRange]:
    """Return the runs of `pages` that nobody may use, rising."""
    if not inode.poisoned:
        return []
    found = PageSet(len(inode.whole))
    for run in inode.poisoned.members(pages.rounded_out(inode.order)):
        for index in run.huge_starts(inode.order):
            found.add(affected(inode, run.intersection(inode.unit_of(index))))
    return found.members(pages)


def usable(inode: Inode, pages: PgRange) -> list[PgRange]:
    """Return the runs of `pages` without those of `unusable`, rising."""
    lost = unusable(inode, pages)
    starts = [pages.start, *[run.stop for run in lost]]
    stops = [*[run.start for run in lost], pages.stop]
    return [PgRange(a, b) for a, b in zip(starts, stops, strict=True) if a < b]


def require_usable(inode: Inode, pages: PgRange) -> None:
    """Raise Poisoned (PAGE_POISONED) at the first page that nobody may use."""
    lost = unusable(inode, pages)
    if lost:
        offset = lost[0].offset
        raise Poisoned(
            Reason.PAGE_POISONED,
            f"the page at offset {offset:#x} of inode {inode.number} is lost to a "
            "memory error: punch its folio, or unpoison it",
            error_offset=offset,
            inode=inode.number,
        )


def pages_with_errors(inode: Inode, errors: Mapping[int, int]) -> PageSet:
    """Return the pages of an inode whose frames have errors.

    `errors` says, by frame, in how many pages from there on one may be.
    """
    bad = PageSet(len(inode.whole))
    for index in inode.filemap.present(inode.whole) if errors else ():
        for pages in errors_of_unit(inode, index, errors):
            bad.add(pages)
    return bad


def errors_of_unit(
    inode: Inode, index: int, errors: Mapping[int, int]
) -> list[PgRange]:
    """Return the pages of one unit whose frames have errors; none of a hole."""
    entry = inode.filemap.get(index)
    if entry is None:
        return []
    frames = inode.unit_of(index).shifted(entry.folio.pfn - index)
    bad = [PgRange(pfn, pfn + nr).intersection(frames) for pfn, nr in errors.items()]
    return [part.shifted(index - entry.folio.pfn) for part in bad if part]


def believe_errors(inode: Inode, errors: Mapping[int, int]) -> None:
    """Note the errors of an inode that nobody can reach yet."""
    for pages in pages_with_errors(inode, errors).members(inode.whole):
        inode.poisoned.add(pages)
