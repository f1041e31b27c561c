"""What the wire adds to the allocator: repeats, lists, watchers, other tenants."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

from gmem.api.host_allocator.v1 import host_allocator_pb2 as pb
from gmem.api.types.v1 import types_pb2
from gmem.client import HostAllocatorClient, HugetlbFile
from gmem.uapi.errors import Errno, Reason
from gmem.uapi.pages import HUGE_PAGE_SIZES, PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.contract.allocators import (
    BACKENDS,
    OVER_THE_WIRE,
    POOLS,
    Wire,
    one_folio,
    pool_of,
    refused,
)

# Another tenant: guest_memfd_hugetlb_reporting_test.


@OVER_THE_WIRE
@POOLS
async def test_hugetlb_and_guest_memfd_report_the_same(
    subject: Wire, page_size: int
) -> None:
    base = await subject.statistics()

    async def assert_stats(r: int, f: int) -> None:
        now = await subject.statistics()
        for size in HUGE_PAGE_SIZES:
            expected = pool_of(base, size)
            if size == page_size:
                expected["free_huge_pages"] -= f
                expected["resv_huge_pages"] += r - f
            assert pool_of(now, size) == expected, (r, f)

    await assert_stats(0, 0)  # H0
    file = await HugetlbFile.create(subject.client, page_size=page_size)
    await assert_stats(0, 0)  # H1
    await file.mmap()
    await assert_stats(1, 0)  # H2
    await file.touch()
    await assert_stats(1, 1)  # H3
    file.munmap()
    await assert_stats(1, 1)  # H4
    for advice in (4, 9):  # MADV_DONTNEED, MADV_REMOVE, after munmap
        assert file.madvise(advice) is Errno.ENOMEM
        await assert_stats(1, 1)  # H5, H6
    await file.close()
    await assert_stats(0, 0)  # H7

    await assert_stats(0, 0)  # G0
    handle = await subject.reserve(page_size, 1)
    await assert_stats(1, 0)  # G1
    folios = await subject.allocate(handle, page_size=page_size)
    await assert_stats(1, 1)  # G2
    await subject.free(handle, folios)
    await assert_stats(1, 0)  # G3
    await subject.unreserve(handle)
    await assert_stats(0, 0)  # G4
    assert await subject.statistics() == base


@OVER_THE_WIRE
async def test_two_tenants_share_one_pool(subject: Wire) -> None:
    async with await HugetlbFile.create(
        subject.client, page_size=SIZE_1G, num_pages=2
    ) as file:
        await file.mmap()
        await refused(subject, Reason.POOL_EMPTY, subject.reserve(SIZE_1G, 1))
    await subject.reserve(SIZE_1G, 1)


# What only the wire has.


@OVER_THE_WIRE
@BACKENDS
async def test_a_repeated_alloc_returns_the_same_folio(
    client: HostAllocatorClient, page_size: int
) -> None:
    handle = await client.reserve(page_size=page_size, num_pages=2)

    async def allocate(request_id: types_pb2.RequestId) -> list[int]:
        folios = await client.allocate(
            handle=handle, page_size=page_size, request_id=request_id
        )
        return [folio.pfn for folio in folios]

    first_id = client.new_request_id()
    first = await allocate(first_id)
    after = await client.get_statistics()
    assert await allocate(first_id) == first
    assert await client.get_statistics() == after
    assert await allocate(client.new_request_id()) != first


@OVER_THE_WIRE
async def test_a_repeated_free_is_answered_and_not_done_again(
    subject: Wire, client: HostAllocatorClient
) -> None:
    handle, folio = await one_folio(subject, SIZE_1G)
    wire = types_pb2.Folio(pfn=folio.pfn, order=folio.order, node=folio.node)
    request_id = client.new_request_id()
    await client.free(handle=handle, folios=[wire], request_id=request_id)
    (taken,) = await subject.allocate(handle, page_size=SIZE_1G)
    assert taken == folio
    await client.free(handle=handle, folios=[wire], request_id=request_id)
    assert int((await subject.reservations())[0]["used_hpages"]) == 1


@OVER_THE_WIRE
async def test_an_id_with_another_body_is_refused(
    subject: Wire, client: HostAllocatorClient
) -> None:
    request_id = client.new_request_id()
    await client.reserve(page_size=SIZE_1G, num_pages=1, request_id=request_id)
    call = client.reserve(page_size=SIZE_1G, num_pages=2, request_id=request_id)
    await refused(subject, Reason.REQUEST_ID_REUSED, call)


@OVER_THE_WIRE
async def test_every_mutation_needs_a_request_id(
    subject: Wire, client: HostAllocatorClient
) -> None:
    stub: Any = client._stub
    for method, request in [
        (stub.Reserve, pb.ReserveRequest(page_size=SIZE_1G, num_pages=1)),
        (stub.UpdatePool, pb.UpdatePoolRequest(page_size=SIZE_1G)),
        (stub.UpdateVmemmapOptimization, pb.UpdateVmemmapOptimizationRequest()),
        (stub.Unreserve, pb.UnreserveRequest(handle=1)),
        (stub.InjectMemoryError, pb.InjectMemoryErrorRequest(pfn=1)),
        (stub.UnpoisonMemory, pb.UnpoisonMemoryRequest(pfn=1)),
    ]:
        call = client.connection.call(method, request)
        await refused(subject, Reason.REQUEST_ID_MISSING, call)


@OVER_THE_WIRE
async def test_absent_fields_mean_their_defaults(client: HostAllocatorClient) -> None:
    handle = await client.reserve(page_size=SIZE_2M, num_pages=1)
    (folio,) = await client.allocate(handle=handle, page_size=SIZE_2M, nr_folios=0)
    assert await client.split(handle=handle, folio=folio, target_page_size=0) == 7


@OVER_THE_WIRE
async def test_a_mode_that_is_no_policy_is_refused(
    subject: Wire, client: HostAllocatorClient
) -> None:
    handle = await subject.reserve(SIZE_2M, 1)
    mode: Any = 999
    policy = types_pb2.MemPolicy(mode=mode)
    call = client.allocate(handle=handle, page_size=SIZE_2M, mempolicy=policy)
    error = await refused(subject, Reason.MEMPOLICY_INVALID, call)
    assert error.errno == Errno.EINVAL
    assert "mode 999" in error.sentence


@OVER_THE_WIRE
async def test_validate_only_answers_and_changes_nothing(
    subject: Wire, client: HostAllocatorClient
) -> None:
    before = await client.get_statistics()
    would = await client.update_pool(
        page_size=SIZE_2M, nr_huge_pages=9999, validate_only=True
    )
    assert await client.get_statistics() == before
    does = await client.update_pool(page_size=SIZE_2M, nr_huge_pages=9999)
    assert (does.pool, does.missing_pages) == (would.pool, would.missing_pages)
    assert does.pool.name == f"hosts/host0/pools/{SIZE_2M}"
    assert does.pool.nr_huge_pages > 500
    assert does.missing_pages == 9999 - does.pool.nr_huge_pages


@OVER_THE_WIRE
async def test_the_switch_is_seen_and_counts_for_later_folios(
    subject: Wire, client: HostAllocatorClient
) -> None:
    handle, folio = await one_folio(subject, SIZE_2M)
    await client.update_vmemmap_optimization(enabled=False)
    assert not (await client.get_statistics()).vmemmap.optimize_enabled
    await subject.split(handle, folio)
    assert await subject.reconstruct(handle, folio, 512) == (folio, 0)


@OVER_THE_WIRE
async def test_lists_come_in_pages(client: HostAllocatorClient) -> None:
    handles = [await client.reserve(page_size=PAGE_SIZE, num_pages=1) for _ in range(3)]
    assert [claim.handle for claim in await client.list_reservations()] == handles
    assert [pool.page_size for pool in await client.list_pools()] == [SIZE_2M, SIZE_1G]

    method = client._stub.ListReservations
    request = pb.ListReservationsRequest(page_size=2)
    page = await client.connection.call(method, request)
    assert [claim.handle for claim in page.reservations] == handles[:2]
    request.page_token = page.next_page_token
    page = await client.connection.call(method, request)
    assert [claim.handle for claim in page.reservations] == handles[2:]
    assert page.next_page_token == ""


@OVER_THE_WIRE
async def test_a_foreign_page_token_is_refused(
    subject: Wire, client: HostAllocatorClient
) -> None:
    stub: Any = client._stub
    for method, request in [
        (stub.ListPools, pb.ListPoolsRequest(page_token="x")),
        (stub.ListReservations, pb.ListReservationsRequest(page_token="eHh4")),
        (stub.ListMemoryErrors, pb.ListMemoryErrorsRequest(page_token="eHh4")),
    ]:
        call = client.connection.call(method, request)
        await refused(subject, Reason.PAGE_TOKEN_INVALID, call)


@OVER_THE_WIRE
async def test_watchers_hear_of_every_change_and_of_no_refusal(
    subject: Wire, client: HostAllocatorClient
) -> None:
    handle, folio = await one_folio(subject, SIZE_2M)
    await subject.split(handle, folio)
    await refused(subject, Reason.FOLIO_STATE, subject.split(handle, folio))
    await subject.reconstruct(handle, folio, 512)
    await subject.error(handle, folio)
    await subject.free(handle, [folio])
    await subject.free(handle, [])
    await subject.unreserve(handle)
    await subject.update_pool(SIZE_2M, 1)
    await client.update_vmemmap_optimization(enabled=True)

    kinds: list[str] = []
    names: set[str] = set()
    async with aclosing(client.watch(start_revision=1)) as stream:
        async for response in stream:
            kinds += [event.kind for event in response.events if event.kind]
            names |= {event.name for event in response.events if event.kind}
            if kinds[-1:] == ["vmemmap.switched"]:
                break
    assert kinds == [
        "reservation.reserved",
        "reservation.allocated",
        "reservation.split",
        "reservation.reconstructed",
        "reservation.poisoned",
        "reservation.freed",
        "reservation.freed",
        "reservation.unreserved",
        "pool.resized",
        "vmemmap.switched",
    ]
    assert f"hosts/host0/reservations/{handle}" in names
    assert (await client.get_statistics()).revision == len(kinds)


@OVER_THE_WIRE
async def test_capabilities_name_the_page_sizes(client: HostAllocatorClient) -> None:
    capabilities = await client.get_capabilities()
    assert capabilities.service == "host_allocator"
    assert list(capabilities.page_sizes) == [PAGE_SIZE, SIZE_2M, SIZE_1G]
    assert capabilities.lineages[0] == "RFC_V1"


@OVER_THE_WIRE
@BACKENDS
async def test_a_memory_error_by_frame_is_told_listed_and_taken_back(
    subject: Wire, client: HostAllocatorClient, page_size: int
) -> None:
    handle, folio = await one_folio(subject, page_size)
    pfn = folio.pfn + (1 << folio.order) - 1
    frame = await client.inject_memory_error(pfn)
    assert (frame.pfn, frame.nr_pages, frame.handle) == (pfn, 1, handle)
    assert await client.list_memory_errors() == [frame]
    await refused(subject, Reason.PAGE_POISONED, client.inject_memory_error(pfn))
    assert await client.unpoison_memory(pfn) == frame
    await refused(subject, Reason.FRAME_UNKNOWN, client.unpoison_memory(pfn))
    await refused(subject, Reason.FRAME_UNKNOWN, client.inject_memory_error(1 << 50))
    assert await client.list_memory_errors() == []

    told: list[tuple[str, str]] = []
    async with aclosing(client.watch(start_revision=3)) as stream:
        async for response in stream:
            told += [(event.kind, event.name) for event in response.events]
            if len(told) > 2:
                break
    name = f"hosts/host0/frames/{pfn:#x}"
    assert told[1:] == [("frame.poisoned", name), ("frame.unpoisoned", name)]


@OVER_THE_WIRE
async def test_a_frame_of_a_free_huge_page_takes_no_error(
    subject: Wire, client: HostAllocatorClient
) -> None:
    _, folio = await one_folio(subject, SIZE_2M)
    beside = folio.pfn + 512
    await refused(subject, Reason.STATE_WRONG, client.inject_memory_error(beside))


@OVER_THE_WIRE
async def test_memory_errors_come_in_pages(client: HostAllocatorClient) -> None:
    handle = await client.reserve(page_size=PAGE_SIZE, num_pages=3)
    folios = await client.allocate(handle=handle, page_size=PAGE_SIZE, nr_folios=3)
    for folio in folios:
        await client.inject_memory_error(folio.pfn)
    method = client._stub.ListMemoryErrors
    request = pb.ListMemoryErrorsRequest(page_size=2)
    page = await client.connection.call(method, request)
    assert [frame.pfn for frame in page.frames] == [each.pfn for each in folios[:2]]
    request.page_token = page.next_page_token
    page = await client.connection.call(method, request)
    assert [frame.pfn for frame in page.frames] == [folios[2].pfn]
    assert page.next_page_token == ""
