"""A total map from page numbers to values, kept as runs of equal values."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Final, Generic, TypeVar

from gmem.uapi.pages import PAGE_SHIFT, U64_LIMIT, PgRange

V = TypeVar("V")

PAGES_LIMIT: Final = U64_LIMIT >> PAGE_SHIFT
"""One more than the last page number that a 64-bit address can have."""


class RunMap(Generic[V]):
    """Every page number below PAGES_LIMIT has one value; `default` to begin with.

    Neighbours with equal values are one run, as mem_attr_array's successor (a maple
    tree) keeps them; the cost follows the number of changes, not of pages.
    """

    def __init__(self, default: V, *, tracked: bool = False) -> None:
        self._starts = [0]
        self._values = [default]
        # Where runs began or begin that have changed since the last `drain`.
        self._touched: set[int] | None = set() if tracked else None

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self._starts)

    def get(self, page: int) -> V:
        """Return the value of `page`."""
        return self._values[bisect_right(self._starts, page) - 1]

    def runs(self, pages: PgRange) -> Iterator[tuple[PgRange, V]]:
        """Iterate over the runs of `pages`, clipped to it, in ascending order."""
        index = bisect_right(self._starts, pages.start) - 1
        start = pages.start
        while start < pages.stop:
            stop = min(self._end_of(index), pages.stop)
            yield PgRange(start, stop), self._values[index]
            start, index = stop, index + 1

    def is_uniform(self, pages: PgRange, value: V) -> bool:
        """Tell whether every page of `pages` has `value`."""
        return all(found == value for _, found in self.runs(pages))

    def set(self, pages: PgRange, value: V) -> None:
        """Give every page of `pages` the value; runs that become equal are joined."""
        if not len(pages):
            return
        assert pages.stop <= PAGES_LIMIT, pages
        # What follows the range keeps its value, so it is read before the splice.
        pieces: list[tuple[int, V]] = []
        if pages.start == 0 or self.get(pages.start - 1) != value:
            pieces.append((pages.start, value))
        if pages.stop < PAGES_LIMIT and self.get(pages.stop) != value:
            pieces.append((pages.stop, self.get(pages.stop)))
        first = bisect_left(self._starts, pages.start)
        last = bisect_right(self._starts, pages.stop)
        if self._touched is not None:
            starts = [start for start, _ in pieces]
            self._touched.update(self._starts[first:last], starts)
        self._starts[first:last] = [start for start, _ in pieces]
        self._values[first:last] = [found for _, found in pieces]

    def drain(self) -> dict[int, V | None]:
        """Return where changed runs begin, and their values; None: there is none.

        Of a `tracked` map, what has changed since the last call.
        """
        assert self._touched is not None, "it is not tracked"
        touched, self._touched = self._touched, set()
        return {start: self._value_at(start) for start in sorted(touched)}

    def reset(self, values: Mapping[int, V]) -> None:
        """Have the runs that `drain` told of; those it never told of are the default's.

        The first run always begins at page 0.
        """
        runs = {0: self._values[0], **values}
        self._starts = sorted(runs)
        self._values = [runs[start] for start in self._starts]
        self.check()

    def _value_at(self, start: int) -> V | None:
        index = bisect_left(self._starts, start)
        found = index < len(self._starts) and self._starts[index] == start
        return self._values[index] if found else None

    def check(self) -> None:
        """Assert that runs ascend from page 0 and that neighbours differ."""
        assert self._starts[0] == 0, self._starts
        assert all(a < b for a, b in pairwise(self._starts)), self._starts
        assert all(a != b for a, b in pairwise(self._values)), self._values

    def _end_of(self, index: int) -> int:
        if index + 1 < len(self._starts):
            return self._starts[index + 1]
        return PAGES_LIMIT
