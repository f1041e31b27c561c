"""Revoking a range that stays accessible: no cached page anywhere, and no SIGBUS.

Punch hole takes pages away that clients are using. Closing the range would give them
SIGBUS; invalidating it while it is open lets them fault the old pages back in; a
parked READ inside an invalidated range is a deadlock. So:

    1. Holes become QUIESCED: nothing of them is cached, their READs are parked.
    2. The rest is invalidated while it is OPEN. A watch notes each page answered
       meanwhile: it may be cached again.
    3. Under the node's lock, all but the pages noted become QUIESCED.
    4. The noted ones are the range of the next round. From the second round on a READ
       of the range is held, not answered: a client that touches the page all the time
       refaults sooner than we hear of the end of the invalidation. Where the
       invalidation itself waits for a held READ, it is answered after HOLD_SECONDS.

A page is cached only by an answer, each answer is noted under the lock, so after
step 3 no QUIESCED page is cached. Each round is smaller than the one before it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Final

from gmem.guest_memfd.core.values import PageState, ViewKind
from gmem.guest_memfd.view.counters import Counters
from gmem.guest_memfd.view.faults import Faults
from gmem.guest_memfd.view.invalidator import Invalidator
from gmem.guest_memfd.view.node import ViewNode, Watch
from gmem.runtime.fusewire import nodeid_of
from gmem.uapi.errors import Contended, KernelError, Reason
from gmem.uapi.pages import PAGE_SHIFT

HOLD_SECONDS: Final = 0.02
"""How long READs of the range are held before an invalidation may be due to them."""
ROUNDS_MAX: Final = 64
"""Rounds after which the range is opened again and the caller told so."""

Runs = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Revoker:
    """Invalidates and quiesces ranges of one session's views."""

    faults: Faults
    invalidator: Invalidator
    counters: Counters

    def invalidate(self, node: ViewNode, view: ViewKind, runs: Runs) -> None:
        """Drop runs of pages from every mapping; dirty bytes are stored first."""
        self.counters.add("invals", len(runs))
        self.invalidator.invalidate(
            nodeid_of(node.ino, view),
            [
                (start << PAGE_SHIFT, (stop - start) << PAGE_SHIFT)
                for start, stop in runs
            ],
        )

    def revocable(self, node: ViewNode, view: ViewKind, start: int, stop: int) -> Runs:
        """Return the runs of `[start, stop)` that may be cached: no READ is parked.

        Of an OPEN range those with a folio; of a closed one everything; of a QUIESCED
        one nothing.
        """
        with node.lock:
            table = node.table
            runs = table.runs_of(view, start, stop, PageState.CLOSING)
            runs += table.runs_of(view, start, stop, PageState.CLOSED)
            for run in table.runs_of(view, start, stop, PageState.OPEN):
                runs += table.attached_in(*run)
        return runs

    def quiesce(self, node: ViewNode, view: ViewKind, start: int, stop: int) -> Runs:
        """Make the OPEN pages of a range QUIESCED; return their runs.

        On return none of them is cached. Raises Contended after ROUNDS_MAX rounds and
        InUse when the connection is gone; the range is OPEN again then.
        """
        self.counters.add("quiesces")
        with node.lock:
            opened = node.table.runs_of(view, start, stop, PageState.OPEN)
            pending = [part for run in opened for part in node.table.attached_in(*run)]
            _quiesce_all_but(node, view, opened, pending)
        try:
            for number in range(ROUNDS_MAX):
                if not pending:
                    return opened
                pending = self._round(node, view, pending, hold=number > 0)
        except KernelError:
            self._reopen(node, view, opened)
            raise
        self._reopen(node, view, opened)
        raise Contended(
            Reason.PAGE_IN_USE,
            f"page {pending[0][0]} was touched again in each of {ROUNDS_MAX} rounds: "
            "have its users pause, then try again",
            error_offset=pending[0][0] << PAGE_SHIFT,
        )

    def _round(
        self, node: ViewNode, view: ViewKind, pending: Runs, *, hold: bool
    ) -> Runs:
        self.counters.add("quiesce_rounds")
        watch = Watch(view, pending[0][0], pending[-1][1], hold=hold)
        with node.lock:
            node.watches.append(watch)
        try:
            with self._releasing(node, watch) if hold else nullcontext():
                self.invalidate(node, view, pending)
        except KernelError:
            with node.lock:
                node.watches.remove(watch)
            raise
        with node.lock:
            node.watches.remove(watch)
            again = _runs_of_pages(watch.answered, pending)
            _quiesce_all_but(node, view, pending, again)
        return again

    @contextmanager
    def _releasing(self, node: ViewNode, watch: Watch) -> Iterator[None]:
        """Have the READs that a watch holds answered when it takes too long."""
        timer = threading.Timer(HOLD_SECONDS, self._release, (node, watch))
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _release(self, node: ViewNode, watch: Watch) -> None:
        """Answer the READs that a watch holds: an invalidation waits for one."""
        with node.lock:
            watch.hold = False
            held = node.parked_in(watch.view, watch.start, watch.stop)
        self.faults.dispatch_again(node, held, held=False)

    def _reopen(self, node: ViewNode, view: ViewKind, runs: Runs) -> None:
        for start, stop in runs:
            self.faults.set_state(node, view, start, stop, PageState.OPEN)


def _quiesce_all_but(
    node: ViewNode, view: ViewKind, runs: Runs, still_open: Runs
) -> None:
    for start, stop in runs:
        node.table.set_state(view, start, stop, PageState.QUIESCED)
    for start, stop in still_open:
        node.table.set_state(view, start, stop, PageState.OPEN)


def _runs_of_pages(pages: set[int], inside: Runs) -> Runs:
    """Return the runs of `pages` that lie in the sorted runs `inside`."""
    runs: Runs = []
    bounds = iter(inside)
    start, stop = next(bounds)
    for page in sorted(pages):
        while page >= stop:
            try:
                start, stop = next(bounds)
            except StopIteration:
                return runs
        if page < start:
            continue
        if runs and runs[-1][1] == page and page > start:
            runs[-1] = (runs[-1][0], page + 1)
        else:
            runs.append((page, page + 1))
    return runs
