"""Another tenant of a pool: a file of memfd_create(MFD_HUGETLB), as far as it counts.

It plays the rows H0 to H7 of guest_memfd_hugetlb_reporting_test: creating the file
takes nothing, mmap reserves, the first touch of a page allocates it, munmap and madvise
give nothing back, close does. Where the pool is too small, mmap has surplus pages made,
up to nr_overcommit_huge_pages. Counters only: it has no bytes.
"""

from __future__ import annotations

from types import TracebackType
from typing import Final, Self

from gmem.api.types.v1.types_pb2 import Folio
from gmem.client.host_allocator import HostAllocatorClient
from gmem.uapi.errors import BadRequest, Errno, Reason, Unsupported
from gmem.uapi.pages import format_size

MADV_DONTNEED: Final = 4
MADV_REMOVE: Final = 9


class HugetlbFile:
    """An open file of huge pages of one size, and at most one mapping of all of it."""

    def __init__(
        self, allocator: HostAllocatorClient, *, page_size: int, num_pages: int
    ) -> None:
        """Made by `create`."""
        self._allocator = allocator
        self._page_size = page_size
        self._num_pages = num_pages
        self._handle: int | None = None
        self._folios: dict[int, Folio] = {}
        self._mapped = False

    @classmethod
    async def create(
        cls, allocator: HostAllocatorClient, *, page_size: int, num_pages: int = 1
    ) -> Self:
        """memfd_create(MFD_HUGETLB) and ftruncate; PAGE_SIZE_UNKNOWN without a pool."""
        sizes = [pool.page_size for pool in await allocator.list_pools()]
        if page_size not in sizes:
            raise BadRequest(
                Reason.PAGE_SIZE_UNKNOWN,
                f"no pool has pages of {format_size(page_size)}; see list_pools()",
                page_size=page_size,
            )
        return cls(allocator, page_size=page_size, num_pages=num_pages)

    async def mmap(self) -> None:
        """Map the whole file MAP_SHARED: the first time reserves all its pages."""
        if self._handle is None:
            self._handle = await self._allocator.reserve(
                page_size=self._page_size,
                num_pages=self._num_pages,
                owner="hugetlb file",
                use_surplus=True,
                charge_rsvd=True,
            )
        self._mapped = True

    async def touch(self, page: int = 0) -> None:
        """Write one byte of `page`: allocates it, unless it is there."""
        if not self._mapped or not 0 <= page < self._num_pages:
            raise BadRequest(
                Reason.RANGE_PAST_END,
                f"page {page} is not mapped; mmap, and stay below {self._num_pages}",
                page=page,
            )
        if page in self._folios:
            return
        assert self._handle is not None
        (self._folios[page],) = await self._allocator.allocate(
            handle=self._handle, page_size=self._page_size
        )

    def munmap(self) -> None:
        """Drop the mapping; pages and reservation stay with the file."""
        self._mapped = False

    def madvise(self, advice: int) -> Errno | None:
        """Return what madvise of the whole mapping fails with, None if it does not.

        Without a mapping that is ENOMEM. MADV_DONTNEED drops page table entries, which
        nobody counts. Unsupported: MADV_REMOVE of a mapping, which would take single
        pages out of the file and their reservation with them.
        """
        if not self._mapped:
            return Errno.ENOMEM
        if advice == MADV_DONTNEED:
            return None
        raise Unsupported(
            Reason.OPERATION_UNSUPPORTED,
            f"madvise {advice} of a mapping is not played; close the file instead",
            advice=advice,
        )

    async def close(self) -> None:
        """Close the last descriptor: pages and reservation go back."""
        self.munmap()
        handle, self._handle = self._handle, None
        if handle is None:
            return
        folios, self._folios = list(self._folios.values()), {}
        if folios:
            await self._allocator.free(handle=handle, folios=folios)
        await self._allocator.unreserve(handle=handle)

    async def __aenter__(self) -> Self:
        """Return the file."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        await self.close()
