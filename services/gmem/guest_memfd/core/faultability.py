"""Who may fault each page of an inode: a total map from page offset to Faultability.

As the 39-patch series' xarray `faultability`, in which *present* means that the host
may fault the page: a set of shared pages. Every page offset below i_size has exactly
one value; adjacent equal runs are one fragment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from gmem.guest_memfd.core.page_set import PageSet
from gmem.guest_memfd.core.values import Fragment
from gmem.uapi.flags import Faultability
from gmem.uapi.pages import PgRange

_VALUES = (Faultability.GUEST, Faultability.ALL)


def opposite(value: Faultability) -> Faultability:
    """Return the other value."""
    return _VALUES[value is Faultability.GUEST]


class FaultabilityMap:
    """The faultability of `nr_pages` pages; a new map is private throughout.

    Before the first bind nothing is host-faultable: the series' xarray is empty.
    """

    __slots__ = ("_shared", "whole")

    def __init__(self, nr_pages: int) -> None:
        self.whole = PgRange(0, nr_pages)
        self._shared = PageSet(nr_pages, tracked=True)

    def __getitem__(self, pgoff: int) -> Faultability:
        """Return the value of one page."""
        assert pgoff in self.whole, (pgoff, self.whole)
        return _VALUES[pgoff in self._shared]

    def store(self, pages: PgRange, value: Faultability) -> None:
        """Give every page of `pages` the value."""
        if value is Faultability.ALL:
            self._shared.add(pages)
        else:
            self._shared.discard(pages)

    def any_in(self, pages: PgRange, value: Faultability) -> bool:
        """Tell whether some page of `pages` has the value."""
        if value is Faultability.ALL:
            return self._shared.any_in(pages)
        return bool(pages) and not self._shared.all_in(pages)

    def runs(self, pages: PgRange) -> Iterator[Fragment]:
        """Yield the maximal runs of `pages` in order."""
        for run, shared in self._shared.runs(pages):
            yield Fragment(run, _VALUES[shared])

    def runs_of(self, pages: PgRange, value: Faultability) -> list[PgRange]:
        """Return the runs of `pages` that have the value."""
        if value is Faultability.ALL:
            return self._shared.members(pages)
        return self._shared.holes(pages)

    def first_fragments(self, limit: int) -> tuple[Fragment, ...]:
        """Return the first `limit` fragments of the whole inode."""
        return tuple(islice(self.runs(self.whole), limit))

    @property
    def shared_pages(self) -> int:
        """The number of pages that the host may fault."""
        return self._shared.count

    @property
    def nr_fragments(self) -> int:
        """The number of maximal runs."""
        return self._shared.nr_runs

    @property
    def fragment_bytes(self) -> int:
        """Bytes of bookkeeping per fragment, rounded up; 0 for a map of one run."""
        return -(-self._shared.bytes_used // self.nr_fragments)

    def drain(self) -> dict[int, bool]:
        """Return the page offsets where the value may flip now, and whether it does.

        Of what has changed since the last call.
        """
        return self._shared.drain()

    def reset(self, flips: Sequence[int]) -> None:
        """Have the value flip exactly at these page offsets, which rise."""
        self._shared.reset(flips)

    def check(self) -> None:
        """Assert that each page has exactly one value and that equal runs merged."""
        self._shared.check()
