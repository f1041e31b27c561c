"""The three conversions: of the 39 patches, by ranges; of the 51, exact; in place.

`to` is 1 for shared, 0 for private.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from tests.model.inode import Inode
from tests.model.rules import PAGE, Refused, differs, require

Item: TypeAlias = tuple[Inode, range]


def convert_all(items: Sequence[Item], to: int) -> None:
    """Convert all items, or write the opposite value over the whole of all of them."""
    work = list(items)
    if differs(55):
        work = [(inode, pages) for inode, pages in items if inode.runs(pages, 1 - to)]
    if not work:
        return
    try:
        if not to:
            for inode, pages in work:
                _require_unused(inode, pages)
        for inode, pages in work:
            if not to or (inode.any_shared(pages) and differs(20)):
                inode.unmap(pages)
            inode.store(pages, to)
            inode.match(pages, to)
    except Refused:
        _opposite(items, 1 - to)
        raise
    for inode, pages in work:
        inode.forget(pages)


def _require_unused(inode: Inode, pages: range) -> None:
    """Refuse at the first page that is mapped or pinned; references do not count."""
    assert differs(16)
    used = [page for _, page in inode.mapped if page in pages]
    used += inode.held(pages, pins_only=True)
    if used:
        require(False, inode.rules.busy, min(used))


def _opposite(items: Sequence[Item], back: int) -> None:
    """The crude rollback; what fails again is a warning, and the end of it."""
    for inode, pages in items:
        try:
            if not back:
                inode.unmap(pages)
            inode.store(pages, back)
            if not back:
                _require_unused(inode, pages)
            inode.match(pages, back)
        except Refused:
            inode.warnings += 1
            return


def convert_exactly(inode: Inode, pages: range, to: int) -> None:
    """Convert the runs that differ, or nothing; only mappings may be gone."""
    work = inode.runs(pages, 1 - to)
    if not to:
        for run in work:
            inode.unmap(run)
            held = inode.held(run, pins_only=False)
            require(not held, inode.rules.busy, held[0] if held else None)
    begun: list[range] = []
    try:
        for run in work:
            begun.append(run)
            inode.store(run, to)
            inode.match(run, to)
    except Refused:
        for run in begun:
            inode.store(run, 1 - to)
            inode.match(run, 1 - to)
        # The series answers with an offset that nobody has set.
        assert differs(46)
        raise


def convert_in_place(inode: Inode, pages: range, to: int) -> None:
    """Convert by steps; the first that is refused is the end, and says where it was."""
    assert differs(73)
    assert differs(74)
    for step in _steps(inode, pages):
        changed = inode.runs(step, 1 - to)
        if not changed:
            continue
        if not to:
            inode.unmap(step)
            assert differs(72)
            held = inode.held(step, pins_only=False)
            require(not held, inode.rules.busy, held[0] if held else None)
        inode.store(step, to)
        try:
            inode.match(step, to)
        except Refused:
            for run in changed:
                inode.store(run, 1 - to)
            raise Refused(errno.ENOMEM, step.start * PAGE) from None


def _steps(inode: Inode, pages: range) -> Iterator[range]:
    """Cut at huge pages; a range of 4K pages is one step."""
    if inode.unit == 1:
        yield pages
        return
    at = pages.start
    while at < pages.stop:
        stop = min(pages.stop, (at // inode.unit + 1) * inode.unit)
        yield range(at, stop)
        at = stop
