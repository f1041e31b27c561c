"""The memory of the model's host: counts of huge pages, and of base pages."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from tests.model.rules import PAGE, require


@dataclass(slots=True)
class Pool:
    """One pool of folios of `unit` pages beside `base` free base pages.

    `nr`, `free` and `resv` are the hstate's; with a unit of 1 there is no pool, and
    folios are base pages. A whole huge page keeps one of its vmemmap pages (64 bytes of
    struct page for each 4K); HVO has saved the others, and a split takes them back.
    """

    unit: int
    nr: int
    base: int
    free: int = 0
    resv: int = 0

    def __post_init__(self) -> None:
        self.free = self.nr

    @property
    def vmemmap(self) -> int:
        """The base pages that a split takes: 4095 for 1G, 7 for 2M."""
        return self.unit * 64 // PAGE - 1

    def reserve(self, pages: int) -> None:
        """Promise folios: never more than are free and not promised yet."""
        if self.unit > 1:
            require(self.resv + pages <= self.free, errno.ENOMEM)
            self.resv += pages

    def unreserve(self, pages: int) -> None:
        """End a promise."""
        if self.unit > 1:
            self.resv -= pages

    def take(self) -> None:
        """Dequeue a folio: out of its reservation, or a base page."""
        if self.unit == 1:
            self.take_base(1)
            return
        require(self.free > 0, errno.ENOMEM)
        self.free -= 1
        self.resv -= 1

    def give(self, *, reserved: bool) -> None:
        """Enqueue a folio; what was reserved is reserved again."""
        if self.unit == 1:
            self.base += 1
            return
        self.free += 1
        self.resv += reserved

    def restore_vmemmap(self) -> None:
        """Take the vmemmap pages of a huge page."""
        self.take_base(self.vmemmap)

    def save_vmemmap(self) -> None:
        """Give them back."""
        self.base += self.vmemmap

    def take_base(self, pages: int) -> None:
        """Take base pages, all or none (ENOMEM)."""
        require(self.base >= pages, errno.ENOMEM)
        self.base -= pages
