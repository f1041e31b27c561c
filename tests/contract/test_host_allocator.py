"""The allocator keeps its word, whichever backend, called or over the wire."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import replace

import pytest

from gmem.host_allocator.core.values import MemPolicy, MemPolicyMode
from gmem.uapi.errors import Errno, Exhausted, Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M, NodeId, Pfn, order_of
from tests.contract.allocators import (
    BACKENDS,
    POOLS,
    Subject,
    levels,
    one_folio,
    pool_of,
    refused,
)

SAVED = {SIZE_1G: 4095, SIZE_2M: 7}

# Every backend.


@BACKENDS
async def test_taking_and_giving_back_all_is_nothing(
    subject: Subject, page_size: int
) -> None:
    before = await subject.statistics()
    handle = await subject.reserve(page_size, 2, owner="vm-0")
    folios = await subject.allocate(handle, page_size=page_size, nr_folios=2)
    assert len(folios) == 2
    assert {folio.order for folio in folios} == {order_of(page_size)}
    assert all(folio.pfn % (1 << folio.order) == 0 for folio in folios)
    (claim,) = await subject.reservations()
    assert (claim["owner"], int(claim["used_hpages"])) == ("vm-0", 2)

    await subject.free(handle, folios)
    await subject.unreserve(handle)
    assert await subject.statistics() == before
    assert await subject.reservations() == []


@BACKENDS
async def test_a_folio_comes_from_the_node_of_the_policy(
    subject: Subject, page_size: int
) -> None:
    handle = await subject.reserve(page_size, 2)
    for mode in (MemPolicyMode.BIND, MemPolicyMode.PREFERRED):
        policy = MemPolicy(mode, (1,))
        (folio,) = await subject.allocate(handle, policy, page_size)
        assert folio.node == 1
        await subject.free(handle, [folio])


@BACKENDS
async def test_a_folio_comes_from_the_node_of_the_reservation(
    subject: Subject, page_size: int
) -> None:
    handle = await subject.reserve(page_size, 1, node=1)
    (folio,) = await subject.allocate(handle, page_size=page_size)
    assert folio.node == 1


@BACKENDS
async def test_a_folio_is_given_to_one_owner_only(
    subject: Subject, page_size: int
) -> None:
    _, mine = await one_folio(subject, page_size)
    other, others = await one_folio(subject, page_size)
    assert mine != others
    await refused(subject, Reason.FOLIO_UNKNOWN, subject.free(other, [mine]))
    await refused(subject, Reason.FOLIO_UNKNOWN, subject.error(other, mine))


@BACKENDS
async def test_a_reservation_ends_with_its_last_folio(
    subject: Subject, page_size: int
) -> None:
    before = await subject.statistics()
    handle, folio = await one_folio(subject, page_size)
    await subject.unreserve(handle)
    (claim,) = await subject.reservations()
    assert claim["closing"] is True
    again = subject.allocate(handle, page_size=page_size)
    await refused(subject, Reason.HANDLE_UNKNOWN, again)

    await subject.free(handle, [folio])
    assert await subject.reservations() == []
    assert await subject.statistics() == before


@BACKENDS
async def test_a_poisoned_folio_is_not_given_out_again(
    subject: Subject, page_size: int
) -> None:
    handle = await subject.reserve(page_size, 2)
    (folio,) = await subject.allocate(handle, page_size=page_size)
    await subject.error(handle, folio)
    await subject.free(handle, [folio])
    (another,) = await subject.allocate(handle, page_size=page_size)
    assert another != folio
    meminfo = (await subject.statistics())["meminfo"]
    assert int(meminfo["hardware_corrupted_kb"]) == 4


@BACKENDS
async def test_a_bad_argument_is_named_with_the_way_out(
    subject: Subject, page_size: int
) -> None:
    handle, _ = await one_folio(subject, page_size)
    nowhere = MemPolicy(MemPolicyMode.BIND, (9,))
    reserve, allocate, pool = subject.reserve, subject.allocate, subject.update_pool
    unknown, size = Reason.PAGE_SIZE_UNKNOWN, Reason.SIZE_INVALID
    node, policy = Reason.NODE_UNKNOWN, Reason.MEMPOLICY_INVALID
    rows: list[tuple[Awaitable[object], Reason, str]] = [
        (reserve(page_size, 0), size, "0 pages is none: ask for 1 or more"),
        (reserve(0, 1), unknown, "no pages of 0 bytes here: use 4096 or"),
        (reserve(12345, 1), unknown, "no pages of 12345 bytes here: use"),
        (reserve(1 << 63, 1), unknown, f"no pages of {1 << 63} bytes here: use"),
        (reserve(page_size, 1, node=7), node, "node 7 does not exist: use 0 to 1"),
        (allocate(handle, page_size=8192), unknown, f": use {page_size}"),
        (allocate(handle, nowhere, page_size), policy, "nodes [9]: allowed are"),
        (pool(PAGE_SIZE, 1), unknown, "4096 bytes here: use 2097152 or 1073741824"),
        (pool(SIZE_1G, 1, node=2), node, "node 2 does not exist: use 0 to 1"),
    ]
    for call, reason, words in rows:
        error = await refused(subject, reason, call)
        assert error.errno == Errno.EINVAL
        assert words in error.sentence


@BACKENDS
async def test_a_folio_or_handle_of_nobody_is_unknown(
    subject: Subject, page_size: int
) -> None:
    handle, folio = await one_folio(subject, page_size)
    strangers = [
        replace(folio, pfn=Pfn((1 << 64) - 1)),
        replace(folio, pfn=Pfn(folio.pfn + (1 << folio.order))),
        replace(folio, order=folio.order + 1),
        replace(folio, order=(1 << 32) - 1),
        replace(folio, node=NodeId(1)),
        replace(folio, node=NodeId(99)),
    ]
    calls = [
        *[subject.free(handle, [folio, stranger]) for stranger in strangers],
        *[subject.split(handle, stranger) for stranger in strangers],
        *[subject.reconstruct(handle, stranger, 512) for stranger in strangers],
        *[subject.error(handle, stranger) for stranger in strangers],
        subject.free(handle, [folio, folio]),
    ]
    for call in calls:
        error = await refused(subject, Reason.FOLIO_UNKNOWN, call)
        assert error.errno == Errno.ENOENT
        assert "use what allocate returned" in error.sentence
    for wrong in (0, handle + 9, (1 << 64) - 1):
        lost: list[Awaitable[object]] = [
            subject.allocate(wrong, page_size=page_size),
            subject.free(wrong, [folio]),
            subject.split(wrong, folio),
            subject.reconstruct(wrong, folio, 512),
            subject.error(wrong, folio),
            subject.unreserve(wrong),
        ]
        for gone in lost:
            error = await refused(subject, Reason.HANDLE_UNKNOWN, gone)
            assert error.errno == Errno.ENOENT
            assert f"handle {wrong} was never issued" in error.sentence


# Pools of huge pages.


@POOLS
async def test_each_lack_has_its_reason(subject: Subject, page_size: int) -> None:
    total = pool_of(await subject.statistics(), page_size)["nr_huge_pages"]
    half = total // 2
    for call, reason in [
        (subject.reserve(page_size, total + 1), Reason.POOL_EMPTY),
        (subject.reserve(page_size, 1 << 63), Reason.POOL_EMPTY),
        (subject.reserve(page_size, half + 1, node=0), Reason.NODE_EMPTY),
    ]:
        error = await refused(subject, reason, call)
        assert isinstance(error, Exhausted)
        assert error.errno == Errno.ENOMEM
        assert "grow the pool" in error.sentence

    handle = await subject.reserve(page_size, half + 1)
    bind = MemPolicy(MemPolicyMode.BIND, (1,))
    await subject.allocate(handle, bind, page_size, nr_folios=half)
    again = subject.allocate(handle, bind, page_size)
    await refused(subject, Reason.POOL_EMPTY, again)
    await subject.allocate(handle, page_size=page_size)
    again = subject.allocate(handle, page_size=page_size)
    error = await refused(subject, Reason.SUBPOOL_EMPTY, again)
    assert error.numbers["max_hpages"] == half + 1


@POOLS
async def test_split_and_reconstruct_move_vmemmap_pages_only(
    subject: Subject, page_size: int
) -> None:
    handle, folio = await one_folio(subject, page_size)
    before = await subject.statistics()
    assert await subject.split(handle, folio) == SAVED[page_size]

    split = await subject.statistics()
    assert split["pools"] == before["pools"]
    free = [int(s["nodes"][0]["free_base_pages"]) for s in (before, split)]
    assert free[0] - free[1] == SAVED[page_size]
    await refused(subject, Reason.FOLIO_STATE, subject.free(handle, [folio]))
    await refused(subject, Reason.FOLIO_STATE, subject.split(handle, folio))
    nr_pages = 1 << folio.order
    wrong = subject.reconstruct(handle, folio, nr_pages - 1)
    await refused(subject, Reason.SIZE_INVALID, wrong)

    first = replace(folio, order=0)
    saved = SAVED[page_size]
    assert await subject.reconstruct(handle, first, nr_pages) == (folio, saved)
    assert levels(await subject.statistics()) == levels(before)
    again = subject.reconstruct(handle, folio, nr_pages)
    await refused(subject, Reason.FOLIO_STATE, again)


@POOLS
async def test_vmemmap_that_cannot_be_restored_leaves_the_folio_whole(
    subject: Subject, page_size: int
) -> None:
    handle, folio = await one_folio(subject, page_size)
    hog = await subject.reserve(PAGE_SIZE, 1, node=0)
    while free := await _free_base_pages(subject):
        await subject.allocate(hog, nr_folios=free)
    before, claims = await subject.statistics(), await subject.reservations()

    with pytest.raises(Exhausted) as caught:
        await subject.split(handle, folio)
    assert caught.value.reason is Reason.VMEMMAP_RESTORE_FAILED
    assert caught.value.errno == Errno.ENOMEM
    assert caught.value.numbers["needed"] == SAVED[page_size]
    # The one trace: the refusal is counted.
    before["vmemmap"]["restore_failures_total"] = "1"
    assert (await subject.statistics(), await subject.reservations()) == (
        before,
        claims,
    )
    await subject.free(handle, [folio])


async def _free_base_pages(subject: Subject) -> int:
    return int((await subject.statistics())["nodes"][0]["free_base_pages"])


@POOLS
async def test_no_target_but_4k_can_be_split_to(
    subject: Subject, page_size: int
) -> None:
    handle, folio = await one_folio(subject, page_size)
    call = subject.split(handle, folio, SIZE_2M)
    error = await refused(subject, Reason.TARGET_UNSUPPORTED, call)
    assert error.errno == Errno.EOPNOTSUPP


@POOLS
async def test_a_pool_below_its_use_has_surplus(
    subject: Subject, page_size: int
) -> None:
    _, _ = await one_folio(subject, page_size)
    assert await subject.update_pool(page_size, 0) == 1
    pool = pool_of(await subject.statistics(), page_size)
    assert (pool["nr_huge_pages"], pool["surplus_huge_pages"]) == (1, 1)


async def test_4k_folios_are_neither_split_nor_reconstructed(subject: Subject) -> None:
    handle, folio = await one_folio(subject, PAGE_SIZE)
    for call in (subject.split(handle, folio), subject.reconstruct(handle, folio, 1)):
        error = await refused(subject, Reason.TARGET_UNSUPPORTED, call)
        assert error.errno == Errno.EOPNOTSUPP


# Demotion, overcommit, interleave.


async def test_a_1g_page_is_demoted_to_512_pages_of_2m(subject: Subject) -> None:
    before = await subject.statistics()
    assert await subject.demote_pool(SIZE_1G, 1, node=1) == (1, 512, 0)
    after = await subject.statistics()
    small, big = pool_of(after, SIZE_2M), pool_of(after, SIZE_1G)
    assert small["free_huge_pages"] == pool_of(before, SIZE_2M)["free_huge_pages"] + 512
    assert big["nr_huge_pages"] == pool_of(before, SIZE_1G)["nr_huge_pages"] - 1
    saved = [int(s["vmemmap"]["saved_pages"]) for s in (before, after)]
    assert saved[0] - saved[1] == 511
    assert await subject.demote_pool(SIZE_1G, 9) == (1, 512, 8)


async def test_a_demotion_that_cannot_be_is_refused(subject: Subject) -> None:
    for call, reason in [
        (subject.demote_pool(SIZE_2M, 1), Reason.TARGET_UNSUPPORTED),
        (subject.demote_pool(PAGE_SIZE, 1), Reason.PAGE_SIZE_UNKNOWN),
        (subject.demote_pool(SIZE_1G, 1, node=7), Reason.NODE_UNKNOWN),
    ]:
        await refused(subject, reason, call)


async def test_surplus_is_for_tenants_that_may_have_it(subject: Subject) -> None:
    before = levels(await subject.statistics())
    await refused(
        subject, Reason.POOL_EMPTY, subject.reserve(SIZE_2M, 5, use_surplus=True)
    )
    await subject.overcommit(SIZE_2M, 1)
    await refused(subject, Reason.POOL_EMPTY, subject.reserve(SIZE_2M, 5))
    handle = await subject.reserve(SIZE_2M, 5, use_surplus=True)
    pool = pool_of(await subject.statistics(), SIZE_2M)
    assert (pool["nr_huge_pages"], pool["surplus_huge_pages"]) == (5, 1)
    await subject.unreserve(handle)
    await subject.overcommit(SIZE_2M, 0)
    after = levels(await subject.statistics())
    for statistics in (before, after):
        # MemTotal grows with the first vmemmap pages that a folio gives back.
        statistics.pop("meminfo")
        for node in statistics["nodes"]:
            node.pop("managed_pages")
    assert after == before

    call = subject.overcommit(SIZE_1G, 1)
    await refused(subject, Reason.ARGUMENT_INVALID, call)


@BACKENDS
async def test_interleave_goes_round_the_nodes(
    subject: Subject, page_size: int
) -> None:
    policy = MemPolicy(MemPolicyMode.INTERLEAVE, (0, 1))
    handle = await subject.reserve(page_size, 2)
    alone = [await subject.allocate(handle, policy, page_size) for _ in range(2)]
    assert [folio.node for folios in alone for folio in folios] == [0, 1]
    await subject.free(handle, [folio for folios in alone for folio in folios])
    together = await subject.allocate(handle, policy, page_size, 2)
    assert [folio.node for folio in together] == [0, 1]


@POOLS
async def test_interleave_takes_other_nodes_where_its_own_are_empty(
    subject: Subject, page_size: int
) -> None:
    policy = MemPolicy(MemPolicyMode.INTERLEAVE, (1,))
    total = pool_of(await subject.statistics(), page_size)["nr_huge_pages"]
    handle = await subject.reserve(page_size, total)
    folios = await subject.allocate(handle, policy, page_size, total)
    half = total // 2
    assert sorted(folio.node for folio in folios) == [0] * half + [1] * half
