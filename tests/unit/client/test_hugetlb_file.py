"""A file of huge pages, as another tenant of a pool: when it asks for what."""

from __future__ import annotations

from typing import Any, cast

import pytest

from gmem.api.host_allocator.v1.host_allocator_pb2 import Pool
from gmem.api.types.v1.types_pb2 import Folio
from gmem.client import HostAllocatorClient, HugetlbFile
from gmem.client.errors import BadRequest, Errno, Reason, Unsupported
from gmem.client.hugetlb_file import MADV_DONTNEED, MADV_REMOVE
from gmem.uapi.pages import SIZE_1G, SIZE_2M


class Ledger:
    """Free and reserved pages as the table of the reporting test counts them."""

    def __init__(self) -> None:
        self.free, self.resv = 0, 0
        self.live: list[Folio] = []

    async def list_pools(self) -> list[Pool]:
        return [Pool(page_size=SIZE_1G)]

    async def reserve(
        self,
        *,
        page_size: int,
        num_pages: int,
        owner: str,
        use_surplus: bool,
        charge_rsvd: bool,
    ) -> int:
        assert (page_size, use_surplus, charge_rsvd) == (SIZE_1G, True, True)
        self.resv += num_pages
        return num_pages

    async def allocate(self, *, handle: int, page_size: int) -> tuple[Folio, ...]:
        self.live.append(Folio(pfn=len(self.live) << 18, order=18))
        self.free, self.resv = self.free - 1, self.resv - 1
        return (self.live[-1],)

    async def free_(self, *, handle: int, folios: list[Folio]) -> None:
        for folio in folios:
            self.live.remove(folio)
        self.free, self.resv = self.free + len(folios), self.resv + len(folios)

    async def unreserve(self, *, handle: int) -> None:
        self.resv -= handle


class Allocator:
    """The client's methods on a ledger (whose `free` is a number)."""

    def __init__(self) -> None:
        self.ledger = Ledger()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ledger, "free_" if name == "free" else name)


async def test_the_rows_of_the_reporting_test_count_as_the_kernel_does() -> None:
    allocator = Allocator()
    ledger = allocator.ledger
    client = cast("HostAllocatorClient", allocator)

    def counted() -> tuple[int, int]:
        return ledger.free, ledger.resv

    file = await HugetlbFile.create(client, page_size=SIZE_1G)
    assert counted() == (0, 0)
    await file.mmap()
    assert counted() == (0, 1)
    await file.touch()
    assert counted() == (-1, 0)
    await file.touch()
    assert counted() == (-1, 0)
    file.munmap()
    assert counted() == (-1, 0)
    assert file.madvise(MADV_DONTNEED) is Errno.ENOMEM
    assert file.madvise(MADV_REMOVE) is Errno.ENOMEM
    assert counted() == (-1, 0)
    await file.mmap()
    assert file.madvise(MADV_DONTNEED) is None
    with pytest.raises(Unsupported):
        file.madvise(MADV_REMOVE)
    assert counted() == (-1, 0)
    await file.close()
    await file.close()
    assert counted() == (0, 0)
    assert ledger.live == []


async def test_what_the_file_does_not_have_is_refused() -> None:
    client = cast("HostAllocatorClient", Allocator())
    with pytest.raises(BadRequest) as caught:
        await HugetlbFile.create(client, page_size=SIZE_2M)
    assert caught.value.reason is Reason.PAGE_SIZE_UNKNOWN
    async with await HugetlbFile.create(client, page_size=SIZE_1G) as file:
        with pytest.raises(BadRequest, match="is not mapped"):
            await file.touch()
        await file.mmap()
        with pytest.raises(BadRequest, match="stay below 1"):
            await file.touch(1)
