"""Cgroups over the wire: every refusal of the tables, lists, limits, watchers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from gmem.api.host_allocator.v1 import host_allocator_pb2 as pb
from gmem.client import HostAllocatorClient
from gmem.client.host_allocator import NO_LIMIT
from gmem.uapi.errors import Reason
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.contract.allocators import OVER_THE_WIRE, Wire, refused

R = Reason
Call = Callable[[HostAllocatorClient], Awaitable[Any]]

REFUSALS: list[tuple[str, Reason, Call]] = [
    ("create a bad name", R.ARGUMENT_INVALID, lambda c: c.create_cgroup("a")),
    ("create it twice", R.CGROUP_EXISTS, lambda c: c.create_cgroup("/a")),
    ("create without parent", R.CGROUP_UNKNOWN, lambda c: c.create_cgroup("/x/y")),
    ("delete nothing", R.CGROUP_UNKNOWN, lambda c: c.delete_cgroup("/x")),
    ("delete a parent", R.OBJECT_IN_USE, lambda c: c.delete_cgroup("/a")),
    ("delete the root", R.OBJECT_IN_USE, lambda c: c.delete_cgroup("/")),
    ("get nothing", R.CGROUP_UNKNOWN, lambda c: c.get_cgroup("/x")),
    (
        "limit nothing",
        R.CGROUP_UNKNOWN,
        lambda c: c.update_cgroup("/x", page_size=SIZE_2M, max=0),
    ),
    (
        "limit 4K",
        R.PAGE_SIZE_UNKNOWN,
        lambda c: c.update_cgroup("/a", page_size=PAGE_SIZE, max=0),
    ),
    (
        "no limit given",
        R.ARGUMENT_INVALID,
        lambda c: c.update_cgroup("/a", page_size=SIZE_2M),
    ),
    (
        "limit the root",
        R.STATE_WRONG,
        lambda c: c.update_cgroup("/", page_size=SIZE_2M, rsvd_max=0),
    ),
    (
        "reserve for nobody",
        R.CGROUP_UNKNOWN,
        lambda c: c.reserve(page_size=SIZE_2M, num_pages=1, cgroup="/x"),
    ),
    (
        "reserve too much",
        R.CGROUP_LIMIT,
        lambda c: c.reserve(
            page_size=SIZE_2M, num_pages=2, cgroup="/a/b", charge_rsvd=True
        ),
    ),
    (
        "a foreign token",
        R.PAGE_TOKEN_INVALID,
        lambda c: c.connection.call(
            c._stub.ListCgroups, pb.ListCgroupsRequest(page_token="x")
        ),
    ),
    *(
        (
            f"{word} without an id",
            R.REQUEST_ID_MISSING,
            lambda c, word=word: c.connection.call(
                getattr(c._stub, word), getattr(pb, f"{word}Request")(name="/a/c")
            ),
        )
        for word in ("CreateCgroup", "UpdateCgroup", "DeleteCgroup")
    ),
]


async def two_cgroups(client: HostAllocatorClient) -> None:
    await client.create_cgroup("/a")
    await client.create_cgroup("/a/b")
    await client.update_cgroup("/a", page_size=SIZE_2M, rsvd_max=SIZE_2M)


@OVER_THE_WIRE
@pytest.mark.parametrize(
    ("reason", "call"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS]
)
async def test_a_bad_call_is_refused_and_changes_nothing(
    subject: Wire, client: HostAllocatorClient, reason: Reason, call: Call
) -> None:
    await two_cgroups(client)
    before = [(c.name, [x.current for x in c.counters]) for c in await _all(client)]
    await refused(subject, reason, call(client))
    after = [(c.name, [x.current for x in c.counters]) for c in await _all(client)]
    assert after == before


@OVER_THE_WIRE
async def test_an_id_with_another_body_is_refused(
    subject: Wire, client: HostAllocatorClient
) -> None:
    await two_cgroups(client)
    request_id = client.new_request_id()
    made = await client.create_cgroup("/c", request_id=request_id)
    assert await client.create_cgroup("/c", request_id=request_id) == made
    calls: list[Awaitable[Any]] = [
        client.create_cgroup("/d", request_id=request_id),
        client.update_cgroup("/c", page_size=SIZE_2M, max=0, request_id=request_id),
        client.delete_cgroup("/c", request_id=request_id),
    ]
    for call in calls:
        await refused(subject, Reason.REQUEST_ID_REUSED, call)


@OVER_THE_WIRE
async def test_charges_and_limits_are_read_in_bytes(
    subject: Wire, client: HostAllocatorClient
) -> None:
    await client.create_cgroup("/a")
    await client.update_cgroup("/a", page_size=SIZE_1G, max=SIZE_1G + 7)
    handle = await client.reserve(
        page_size=SIZE_1G, num_pages=2, cgroup="/a", charge_rsvd=True
    )
    folios = await client.allocate(handle=handle, page_size=SIZE_1G, nr_folios=2)
    assert len(folios) == 1
    again = client.allocate(handle=handle, page_size=SIZE_1G)
    await refused(subject, Reason.CGROUP_LIMIT, again)
    (small, large) = (await client.get_cgroup("/a")).counters
    assert (small.page_size, small.current, small.rsvd_current) == (SIZE_2M, 0, 0)
    assert not small.HasField("max")
    assert (large.current, large.max, large.max_usage) == (SIZE_1G,) * 3
    assert (large.rsvd_current, large.rsvd_max_usage) == (2 * SIZE_1G,) * 2
    assert (large.events_max, large.events_local_max) == (1, 1)
    root = (await client.get_cgroup()).counters[1]
    assert (root.current, root.events_max, root.events_local_max) == (SIZE_1G, 1, 0)

    unlimited = await client.update_cgroup("/a", page_size=SIZE_1G, max=NO_LIMIT)
    assert not unlimited.counters[1].HasField("max")
    (claim,) = await client.list_reservations()
    assert claim.cgroup == "/a"


@OVER_THE_WIRE
async def test_cgroups_come_in_pages_and_are_watched(
    client: HostAllocatorClient,
) -> None:
    await two_cgroups(client)
    await client.delete_cgroup("/a/b")
    assert [cgroup.name for cgroup in await _all(client)] == ["/", "/a"]
    request = pb.ListCgroupsRequest(page_size=1)
    page = await client.connection.call(client._stub.ListCgroups, request)
    assert [cgroup.name for cgroup in page.cgroups] == ["/"]
    request.page_token = page.next_page_token
    page = await client.connection.call(client._stub.ListCgroups, request)
    assert [cgroup.name for cgroup in page.cgroups] == ["/a"]
    assert page.next_page_token == ""

    kinds: list[str] = []
    async with aclosing(client.watch(start_revision=1)) as stream:
        async for response in stream:
            kinds += [event.kind for event in response.events if event.kind]
            if "cgroup.deleted" in kinds:
                break
    assert kinds == ["cgroup.created"] * 2 + ["cgroup.updated", "cgroup.deleted"]


async def _all(client: HostAllocatorClient) -> list[pb.Cgroup]:
    return await client.list_cgroups()
