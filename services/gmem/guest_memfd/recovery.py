"""Taking over the views of a service that died, from the page states it left.

The journal says what each page *is*: shared or private. The page states say what was
*reachable* when the service died, perhaps in the middle of an operation that the
journal knows nothing of. What disagrees is closed, taken from every process, and shown
where it belongs. Three things the table itself knows best:

* which folio a page has. A client may have been answered with it already, by whoever
  stood in, so it is neither taken away nor given twice.
* how many files of a view are open.
* whether bytes are fit to be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.poison import unusable
from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.guest_memfd.page_states import InodeTable, runs
from gmem.uapi.flags import Faultability

Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Misplaced:
    """Pages that may be cached through a view that must not show them.

    `poisoned` ones are shown in no other view either.
    """

    ino: int
    view: ViewKind
    start: int
    stop: int
    poisoned: bool = False


def settle(table: InodeTable, inode: Inode | None) -> list[Misplaced]:
    """Give every page its lasting state; return what must be invalidated first.

    Pages of the return value are CLOSING, and CLOSED in their other view: `finish`
    opens that one. No request is answered by us yet. Without an `inode` the states
    themselves decide: what was being taken away is shown again.
    """
    wanted = _shared(table) if inode is None else _shared_by(inode, table.nr_pages)
    lost = _lost_of(inode, table.nr_pages)
    masks = {ViewKind.HOST: wanted & ~lost, ViewKind.GUEST: ~wanted & ~lost}
    if inode is None:
        masks[ViewKind.GUEST] = table.guest != PageState.CLOSED
    misplaced: list[Misplaced] = []
    waits = np.zeros(table.nr_pages, np.bool_)
    states = {ViewKind.HOST: table.host, ViewKind.GUEST: table.guest}
    for view, mask in masks.items():
        wrong = (states[view] != PageState.CLOSED) & ~mask
        states[view][wrong] = PageState.CLOSING
        waits |= wrong
        for bad, part in ((False, wrong & ~lost), (True, wrong & lost)):
            misplaced += [Misplaced(table.ino, view, *r, bad) for r in runs(part, 0)]
    for view, mask in masks.items():
        states[view][mask & ~waits] = PageState.OPEN
        states[view][mask & waits] = PageState.CLOSED
    return misplaced


def finish(
    misplaced: Iterable[Misplaced],
    invalidate: Callable[[int, ViewKind, int, int], object],
    set_state: Callable[[int, ViewKind, int, int, PageState], None],
) -> None:
    """Take what is misplaced from every process, then show it where it belongs.

    Blocks; somebody must be answering requests.
    """
    for part in misplaced:
        pages = part.start, part.stop
        other = ViewKind.GUEST if part.view is ViewKind.HOST else ViewKind.HOST
        invalidate(part.ino, part.view, *pages)
        set_state(part.ino, part.view, *pages, PageState.CLOSED)
        if not part.poisoned:
            set_state(part.ino, other, *pages, PageState.OPEN)


def _lost_of(inode: Inode | None, nr_pages: int) -> Mask:
    """Return the pages that a memory error has taken."""
    mask = np.zeros(nr_pages, np.bool_)
    for pages in unusable(inode, inode.whole) if inode is not None else ():
        mask[pages.start : pages.stop] = True
    return mask


def _shared(table: InodeTable) -> Mask:
    closing = (table.host == PageState.CLOSING) & (table.guest != PageState.OPEN)
    shown = (table.host == PageState.OPEN) | (table.host == PageState.QUIESCED)
    return np.asarray(closing | shown, np.bool_)


def _shared_by(inode: Inode, nr_pages: int) -> Mask:
    mask = np.zeros(nr_pages, np.bool_)
    for pages in inode.faultability.runs_of(inode.whole, Faultability.ALL):
        mask[pages.start : pages.stop] = True
    return mask
