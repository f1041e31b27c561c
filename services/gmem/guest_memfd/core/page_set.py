"""A set of pages of one inode, kept as the offsets where membership flips.

    pages      0 1 2 3 4 5 6 7 8 9
    members        x x x     x x
    flips          2     5   7   9

A page is a member when an odd number of flips lies at or before it. Runs merge by
themselves: adding [5, 7) removes the flips 5 and 7. A change costs O(log n) plus the
flips it removes, a look-up O(log n); one flip is all that a run costs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise

from sortedcontainers import SortedList

from gmem.uapi.pages import PgRange

# A flip is one int of a SortedList; its list slot is counted with the list.
_INT_BYTES = sys.getsizeof(1 << 29)


class PageSet:
    """A set of pages of `[0, nr_pages)`; `count` members."""

    __slots__ = ("_flips", "_touched", "count", "nr_pages")

    def __init__(self, nr_pages: int, *, tracked: bool = False) -> None:
        """Start empty; a `tracked` set remembers what has changed, for `drain`."""
        self.nr_pages = nr_pages
        self.count = 0
        self._flips: SortedList[int] = SortedList()
        self._touched: set[int] | None = set() if tracked else None

    def __contains__(self, page: object) -> bool:
        """Tell whether page number `page` is a member."""
        return isinstance(page, int) and self._flips.bisect_right(page) % 2 == 1

    def __bool__(self) -> bool:
        """Tell whether there is a member."""
        return self.count > 0

    def add(self, pages: PgRange) -> None:
        """Make all of `pages` members."""
        self._assign(pages, member=True)

    def discard(self, pages: PgRange) -> None:
        """Make none of `pages` a member."""
        self._assign(pages, member=False)

    def any_in(self, pages: PgRange) -> bool:
        """Tell whether some page of `pages` is a member."""
        if not pages:
            return False
        return pages.start in self or self._flips_inside(pages) > 0

    def all_in(self, pages: PgRange) -> bool:
        """Tell whether every page of `pages` is a member."""
        if not pages:
            return True
        return pages.start in self and self._flips_inside(pages) == 0

    def runs(self, pages: PgRange) -> Iterator[tuple[PgRange, bool]]:
        """Yield the maximal runs of `pages`, in order, each with its membership."""
        if not pages:
            return
        member = self._single(pages)
        if member is not None:
            yield pages, member
            return
        first = self._flips.bisect_right(pages.start)
        member, start = first % 2 == 1, pages.start
        for flip in self._flips.islice(first):
            if flip >= pages.stop:
                break
            yield PgRange(start, flip), member
            member, start = not member, flip
        yield PgRange(start, pages.stop), member

    def members(self, pages: PgRange) -> list[PgRange]:
        """Return the runs of members inside `pages`."""
        member = self._single(pages)
        if member is not None:
            return [pages] if member else []
        return [run for run, member in self.runs(pages) if member]

    def holes(self, pages: PgRange) -> list[PgRange]:
        """Return the runs of pages inside `pages` that are no members."""
        member = self._single(pages)
        if member is not None:
            return [] if member else [pages]
        return [run for run, member in self.runs(pages) if not member]

    @property
    def nr_runs(self) -> int:
        """The number of maximal runs, of members and others, over all pages."""
        edges = (0, self.nr_pages)
        return 1 + len(self._flips) - sum(int(edge in self._flips) for edge in edges)

    @property
    def bytes_used(self) -> int:
        """The bytes of memory that the flips take."""
        parts: list[list[int]] = vars(self._flips)["_lists"]
        lists = sum(sys.getsizeof(part) for part in parts)
        return lists + len(self._flips) * _INT_BYTES

    def drain(self) -> dict[int, bool]:
        """Return the flips that may have changed, and whether each is there now."""
        assert self._touched is not None, "it is not tracked"
        touched, self._touched = self._touched, set()
        return {flip: flip in self._flips for flip in sorted(touched)}

    def reset(self, flips: Sequence[int]) -> None:
        """Have exactly these flips, which rise."""
        self._flips = SortedList(flips)
        whole = PgRange(0, self.nr_pages)
        self.count = sum(len(run) for run in self.members(whole))

    def check(self) -> None:
        """Assert that flips are strictly rising, inside, and agree with the count."""
        flips = list(self._flips)
        assert all(a < b for a, b in pairwise(flips)), flips
        assert not flips or flips[0] >= 0, flips[0]
        assert not flips or flips[-1] <= self.nr_pages, flips[-1]
        assert len(flips) % 2 == 0, len(flips)
        counted = sum(len(run) for run in self.members(PgRange(0, self.nr_pages)))
        assert counted == self.count, (counted, self.count)

    def _single(self, pages: PgRange) -> bool | None:
        """Tell whether all of `pages` are members, or none; None where some are.

        Most ranges that are asked for are one run: this is the short way. Of no pages
        at all it says None.
        """
        low = self._flips.bisect_right(pages.start)
        if not pages or self._flips.bisect_left(pages.stop) > low:
            return None
        return low % 2 == 1

    def _flips_inside(self, pages: PgRange) -> int:
        """Count the flips strictly between the first and the last page's end."""
        low = self._flips.bisect_right(pages.start)
        return self._flips.bisect_left(pages.stop) - low

    def _assign(self, pages: PgRange, *, member: bool) -> None:
        start, stop, flips = pages.start, pages.stop, self._flips
        assert stop <= self.nr_pages, (pages, self.nr_pages)
        if start == stop:
            return
        low, high = flips.bisect_left(start), flips.bisect_right(stop)
        # Flips lose their places one by one: what is before and behind has to be as
        # it was, and in between nothing flips any more.
        gone = list(flips[low:high]) if high > low else []
        before, after = low % 2 == 1, high % 2 == 1
        members = _members_between(start, stop, gone, member=before)
        if self._touched is not None:
            # What of it comes back, or is new, is at an end of the range.
            self._touched.update(gone, (start, stop))
        if gone:
            del flips[low:high]
        if before != member:
            flips.add(start)
        if after != member:
            flips.add(stop)
        self.count += (stop - start - members) if member else -members


def _members_between(start: int, stop: int, flips: list[int], *, member: bool) -> int:
    """Count the members of `[start, stop)`, where `member` is what begins there."""
    count = 0
    for flip in flips:
        if member:
            count += flip - start
        member, start = not member, flip
    return count + (stop - start if member else 0)
