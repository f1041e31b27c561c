"""Pages, frames and ranges: the units of everything, and the only conversions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NewType

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
SIZE_2M: Final = 1 << 21
SIZE_1G: Final = 1 << 30
U64_LIMIT: Final = 1 << 64

PgOff = NewType("PgOff", int)
"""A page offset inside one inode."""
Gfn = NewType("Gfn", int)
"""A guest frame number of one VM."""
Pfn = NewType("Pfn", int)
"""A host frame number."""
NodeId = NewType("NodeId", int)
"""A NUMA node of one host."""

PAGE_SIZES: Final = (PAGE_SIZE, SIZE_2M, SIZE_1G)
HUGE_PAGE_SIZES: Final = (SIZE_2M, SIZE_1G)


def order_of(page_size: int) -> int:
    """Return log2 of the pages in one folio of `page_size` bytes (4K: 0, 1G: 18)."""
    assert page_size in PAGE_SIZES, page_size
    return page_size.bit_length() - 1 - PAGE_SHIFT


def page_size_of(order: int) -> int:
    """Return the bytes in one folio of `order`."""
    assert order >= 0, order
    return PAGE_SIZE << order


def format_size(size: int) -> str:
    """Write `size` bytes as people say it: `1G`, `2M`, `4K`, `17B`."""
    for shift, letter in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{letter}"
    return f"{size}B"


def cut(offset: int, size: int, piece: int) -> Iterator[tuple[int, int]]:
    """Yield offset and size of the pieces of a byte range, cut at multiples of `piece`.

    So that two pieces share no page, wherever the range begins.
    """
    end = offset + size
    while offset < end:
        stop = min(end, (offset // piece + 1) * piece)
        yield offset, stop - offset
        offset = stop


@dataclass(frozen=True, slots=True, order=True)
class PgRange:
    """A half-open range of pages, `[start, stop)`, of an inode or of a VM's gfns."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        """Assert that the range is not reversed; an empty one is allowed."""
        assert 0 <= self.start <= self.stop, (self.start, self.stop)

    @classmethod
    def of_bytes(cls, offset: int, size: int) -> PgRange:
        """Return the pages of an aligned byte range."""
        assert offset % PAGE_SIZE == 0, offset
        assert size % PAGE_SIZE == 0, size
        return cls(offset >> PAGE_SHIFT, (offset + size) >> PAGE_SHIFT)

    @classmethod
    def around(cls, offset: int, size: int) -> PgRange:
        """Return the pages that any byte range touches."""
        return cls(offset >> PAGE_SHIFT, (offset + size + PAGE_SIZE - 1) >> PAGE_SHIFT)

    def __len__(self) -> int:
        """Return the number of pages."""
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        """Iterate over the page numbers."""
        return iter(range(self.start, self.stop))

    def __contains__(self, page: object) -> bool:
        """Tell whether page number `page` lies in the range."""
        return isinstance(page, int) and self.start <= page < self.stop

    @property
    def offset(self) -> int:
        """The byte offset of the first page."""
        return self.start << PAGE_SHIFT

    @property
    def size(self) -> int:
        """The bytes in the range."""
        return len(self) << PAGE_SHIFT

    def overlaps(self, other: PgRange) -> bool:
        """Tell whether any page lies in both."""
        return self.start < other.stop and other.start < self.stop

    def covers(self, other: PgRange) -> bool:
        """Tell whether every page of `other` lies in this range."""
        return self.start <= other.start and other.stop <= self.stop

    def intersection(self, other: PgRange) -> PgRange:
        """Return the common pages; an empty range where there are none."""
        start = max(self.start, other.start)
        return PgRange(start, max(start, min(self.stop, other.stop)))

    def rounded_out(self, order: int) -> PgRange:
        """Return the smallest range of whole order-sized folios that covers this."""
        mask = (1 << order) - 1
        return PgRange(self.start & ~mask, (self.stop + mask) & ~mask)

    def rounded_in(self, order: int) -> PgRange:
        """Return the whole order-sized folios inside this range; may be empty."""
        mask = (1 << order) - 1
        start = (self.start + mask) & ~mask
        return PgRange(start, max(start, self.stop & ~mask))

    def huge_starts(self, order: int) -> range:
        """Iterate over the first pages of the folios of `order` that this touches."""
        out = self.rounded_out(order)
        return range(out.start, out.stop, 1 << order)

    def shifted(self, by: int) -> PgRange:
        """Return the range moved by `by` pages."""
        return PgRange(self.start + by, self.stop + by)
