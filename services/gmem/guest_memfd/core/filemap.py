"""Which folio lies at which page offset of an inode: one entry per unit of its size.

A unit is `2^order` pages, aligned; it is a hole, WHOLE (one folio of the inode's page
size) or SPLIT (that many folios of PAGE_SIZE, in the same frames). Units of a 4K inode
are never split. The series' page cache holds the same, one slot per page.

    attached    the page-state table has the folio: views may show it

A folio is inserted unattached and attached when its structure is what faultability
asks for, so a WHOLE folio with a shared page is never reachable by the host.

Millions of entries must be cheap: an entry is 8 bytes in an array of a chunk that
exists only while it has entries.

    63 ............. 12 | 11 .... 2 | 1     | 0
    pfn + 1             | node      | split | attached
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from gmem.guest_memfd.core.values import Folio
from gmem.uapi.pages import NodeId, Pfn, PgRange

_CHUNK_SHIFT: Final = 9
_CHUNK_UNITS: Final = 1 << _CHUNK_SHIFT
_ATTACHED: Final = 1 << 0
_SPLIT: Final = 1 << 1
_NODE_SHIFT: Final = 2
_NODE_LIMIT: Final = 1 << 10
_PFN_SHIFT: Final = 12


@dataclass(frozen=True, slots=True)
class Entry:
    """The folio of one unit, and how it is kept."""

    folio: Folio
    split: bool
    attached: bool


class Filemap:
    """The folios of one inode of `nr_pages` pages in units of `order`.

    An `index` is the first page of a unit.
    """

    __slots__ = (
        "_changed",
        "_chunks",
        "_used",
        "nr_pages",
        "nr_split",
        "nr_whole",
        "order",
    )

    def __init__(self, nr_pages: int, order: int) -> None:
        self.nr_pages = nr_pages
        self.order = order
        self.nr_whole = 0
        self.nr_split = 0
        self._chunks: dict[int, array[int]] = {}
        self._used: dict[int, int] = {}
        self._changed: set[int] = set()

    def get(self, index: int) -> Entry | None:
        """Return the entry of the unit at `index`; None is a hole."""
        word = self._word(index)
        return self._entry(word) if word else None

    def insert(self, index: int, folio: Folio) -> None:
        """Fill a hole with a whole folio, unattached."""
        assert self._word(index) == 0, index
        assert folio.order == self.order, folio
        assert 0 <= folio.node < _NODE_LIMIT, folio
        unit = index >> self.order
        chunk = unit >> _CHUNK_SHIFT
        if chunk not in self._chunks:
            self._chunks[chunk] = array("q", bytes(8 * _CHUNK_UNITS))
            self._used[chunk] = 0
        self._used[chunk] += 1
        self._write(index, (folio.pfn + 1) << _PFN_SHIFT | folio.node << _NODE_SHIFT)
        self.nr_whole += 1

    def remove(self, index: int) -> Entry:
        """Make a hole of a unit that has a folio; return what was there."""
        entry = self.get(index)
        assert entry is not None, index
        self._write(index, 0)
        chunk = (index >> self.order) >> _CHUNK_SHIFT
        self._used[chunk] -= 1
        if self._used[chunk] == 0:
            del self._chunks[chunk], self._used[chunk]
        self._count(entry.split, -1)
        return entry

    def set_split(self, index: int, *, split: bool) -> None:
        """Note that the unit was split, or made whole again."""
        assert self.order > 0, index
        word = self._word(index)
        assert word != 0, index
        assert bool(word & _SPLIT) is not split, index
        self._write(index, word ^ _SPLIT)
        self._count(split, +1)
        self._count(not split, -1)

    def set_attached(self, index: int, *, attached: bool) -> None:
        """Note that the page-state table has the folio, or has it no longer."""
        word = self._word(index)
        assert word != 0, index
        assert bool(word & _ATTACHED) is not attached, index
        unit = index >> self.order
        self._chunks[unit >> _CHUNK_SHIFT][unit % _CHUNK_UNITS] = word ^ _ATTACHED

    def is_present(self, pgoff: int) -> bool:
        """Tell whether a page has a folio."""
        return self._word(pgoff >> self.order << self.order) != 0

    def present(self, pages: PgRange, limit: int | None = None) -> list[int]:
        """Return the indexes of units with a folio that touch `pages`, in order.

        At most `limit` of them: ask again behind the last one.
        """
        return [index for index, _ in islice(self._walk(pages), limit)]

    def entries(self, pages: PgRange) -> Iterator[tuple[int, Entry]]:
        """Yield index and entry of each unit with a folio that touches `pages`."""
        for index, word in self._walk(pages):
            yield index, self._entry(word)

    def unattached(self, pages: PgRange) -> list[int]:
        """Return the indexes of units in `pages` whose folio no view can show."""
        return [index for index, word in self._walk(pages) if not word & _ATTACHED]

    def next_hole(self, pages: PgRange, limit: int) -> PgRange:
        """Return the first run of at most `limit` hole units in `pages`; else empty.

        `pages` are whole units.
        """
        step = 1 << self.order
        start = pages.start
        while start < pages.stop and self._word(start):
            start += step
        stop = start
        end = min(pages.stop, start + limit * step)
        while stop < end and not self._word(stop):
            stop += step
        return PgRange(start, stop)

    def drain(self) -> dict[int, list[list[int]]]:
        """Return the chunks that have changed since the last call, as runs.

        A run is [place, nr, pfn, node, split], of neighbouring units whose frames are
        neighbours. Whether a folio is attached is not told.
        """
        changed, self._changed = self._changed, set()
        return {chunk: self._runs_of(chunk) for chunk in sorted(changed)}

    def restore(self, chunk: int, runs: Sequence[Sequence[int]]) -> None:
        """Insert what `drain` told of a chunk, unattached."""
        for place, nr, pfn, node, split in runs:
            for number in range(nr):
                unit = (chunk << _CHUNK_SHIFT) + place + number
                first = Pfn(pfn + (number << self.order))
                self.insert(unit << self.order, Folio(first, self.order, NodeId(node)))
                if split:
                    self.set_split(unit << self.order, split=True)

    def _runs_of(self, chunk: int) -> list[list[int]]:
        runs: list[list[int]] = []
        for place, word in enumerate(self._chunks.get(chunk, ())):
            if word == 0:
                continue
            pfn, node = (word >> _PFN_SHIFT) - 1, (word >> _NODE_SHIFT) % _NODE_LIMIT
            rest = [node, int(bool(word & _SPLIT))]
            if runs:
                at, nr, first, *same = runs[-1]
                follows = (at + nr, first + (nr << self.order)) == (place, pfn)
                if follows and same == rest:
                    runs[-1][1] += 1
                    continue
            runs.append([place, 1, pfn, *rest])
        return runs

    def check(self) -> None:
        """Assert that the counters agree with the entries, and that no frame is twice.

        Reads every entry.
        """
        entries = [entry for _, entry in self.entries(PgRange(0, self.nr_pages))]
        split = sum(entry.split for entry in entries)
        assert split == self.nr_split, (split, self.nr_split)
        assert len(entries) == self.nr_split + self.nr_whole, len(entries)
        assert len({entry.folio.pfn for entry in entries}) == len(entries)
        assert sum(self._used.values()) == len(entries)

    def _walk(self, pages: PgRange) -> Iterator[tuple[int, int]]:
        """Yield index and word of each unit with a folio that touches `pages`."""
        if not pages:
            return
        first, last = pages.start >> self.order, (pages.stop - 1) >> self.order
        for number in self._chunks_between(first >> _CHUNK_SHIFT, last >> _CHUNK_SHIFT):
            base = number << _CHUNK_SHIFT
            low, high = max(first - base, 0), last - base + 1
            # A copy: the walk must not be disturbed by what its caller changes.
            words = self._chunks[number][low:high]
            for unit, word in enumerate(words, start=base + low):
                if word:
                    yield unit << self.order, word

    def _chunks_between(self, first: int, last: int) -> list[int]:
        if len(self._chunks) < last - first:
            return sorted(n for n in self._chunks if first <= n <= last)
        return [n for n in range(first, last + 1) if n in self._chunks]

    def _entry(self, word: int) -> Entry:
        pfn = Pfn((word >> _PFN_SHIFT) - 1)
        node = NodeId((word >> _NODE_SHIFT) % _NODE_LIMIT)
        folio = Folio(pfn, self.order, node)
        return Entry(folio, bool(word & _SPLIT), bool(word & _ATTACHED))

    def _word(self, index: int) -> int:
        assert 0 <= index < self.nr_pages, index
        assert index & ((1 << self.order) - 1) == 0, (index, self.order)
        unit = index >> self.order
        chunk = self._chunks.get(unit >> _CHUNK_SHIFT)
        return 0 if chunk is None else chunk[unit % _CHUNK_UNITS]

    def _write(self, index: int, word: int) -> None:
        unit = index >> self.order
        self._changed.add(unit >> _CHUNK_SHIFT)
        self._chunks[unit >> _CHUNK_SHIFT][unit % _CHUNK_UNITS] = word

    def _count(self, split: bool, by: int) -> None:
        if split:
            self.nr_split += by
        else:
            self.nr_whole += by
