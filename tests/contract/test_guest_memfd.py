"""guest_memfd over the wire: repeats, tokens, lists, watchers."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.client import GuestMemfdClient, HostAllocatorClient
from gmem.runtime.broker import TOKENS_MAX, Broker
from gmem.runtime.config import HostShape
from gmem.uapi.errors import Reason
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, PAGE_SIZES, SIZE_2M
from tests.contract.guest_memfd_scene import (
    KEEP,
    MUTATIONS,
    PUNCH,
    RIGHT,
    SCENE_SHAPE,
    Body,
    Scene,
    build_scene,
    everything,
    named_in,
)
from tests.support.backends import BOTH
from tests.support.hosts import VM, Host, changes, new_inode, refused

pytestmark = pytest.mark.fuse
BACKENDS = BOTH


@pytest.fixture(scope="module")
def host_shape() -> HostShape:
    """Sixteen 2M pages, and little else."""
    return SCENE_SHAPE


@pytest.fixture
def rpc() -> str:
    """The call that a test is about, where it is not a parameter."""
    return "ConvertRange"


@pytest.fixture
async def scene(clean_host: Host, gmem: GuestMemfdClient, rpc: str) -> Scene:
    """As much of the scene as a call of `rpc` needs, which the test may change."""
    named = named_in(RIGHT[rpc], OTHER[rpc])
    return Scene(gmem, await build_scene(clean_host, {"shared", *named}))


# Ids.


# A second body for each mutation: the same id may not come with it.
OTHER: dict[str, Body] = {
    "CreateGuestMemfd": {"size": 2 * PAGE_SIZE},
    "DeleteGuestMemfd": {"name": "@unused"},
    "Fallocate": {"mode": PUNCH},
    "BindMemslot": {"slot": 8},
    "UnbindMemslot": {"slot": 7},
    "ConvertRange": {"offset": PAGE_SIZE},
    "PopulateRange": {"offset": 2 * PAGE_SIZE},
    "SetMempolicy": {"offset": PAGE_SIZE},
    "PinPages": {"holder": "another"},
    "UnpinPages": {"hold": 2},
    "OpenView": {"vm": VM},
    "WriteRange": {"offset": 1},
    "InjectMemoryError": {"offset": 0},
    "UnpoisonMemory": {"offset": PAGE_SIZE},
}


@pytest.mark.parametrize("rpc", MUTATIONS)
async def test_an_id_used_again_repeats_the_reply_or_is_refused(
    scene: Scene, allocator: HostAllocatorClient, rpc: str
) -> None:
    right: Body = {"request_id": scene.gmem.new_request_id()}
    if rpc == "UnpinPages":
        right["hold"] = (await scene.call("PinPages", {})).hold
    first = await scene.call(rpc, right)
    before = await everything(scene.gmem, allocator)
    again = await scene.call(rpc, right)
    assert again == first
    with refused(Reason.REQUEST_ID_REUSED, "send a new one", errno="EINVAL"):
        await scene.call(rpc, right | OTHER[rpc])
    assert changes(before, await everything(scene.gmem, allocator)) == []


async def test_a_refusal_is_remembered_as_well(scene: Scene) -> None:
    body: Body = {
        "request_id": scene.gmem.new_request_id(),
        "name": "@shared",
        "offset": 3 * PAGE_SIZE,
    }
    with refused(Reason.PAGE_IN_USE, "disk"):
        await scene.call("ConvertRange", body)
    (pin,) = (await scene.gmem.get_guest_memfd(scene.words["shared"])).holds
    await scene.gmem.unpin_pages(hold=pin.hold)
    with refused(Reason.PAGE_IN_USE, "disk"):
        await scene.call("ConvertRange", body)
    body["request_id"] = scene.gmem.new_request_id()
    await scene.call("ConvertRange", body)


async def test_two_callers_with_one_id_make_one_inode(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    request_id = gmem.new_request_id()
    made = await asyncio.gather(
        *(
            gmem.create_guest_memfd(
                size=SIZE_2M, page_size=SIZE_2M, request_id=request_id
            )
            for _ in range(5)
        )
    )
    assert {inode.name for inode in made} == {made[0].name}
    assert len(await gmem.list_guest_memfds()) == 1


# Tokens.


async def test_a_token_works_once(clean_host: Host, gmem: GuestMemfdClient) -> None:
    inode = await new_inode(clean_host, gmem)
    program = clean_host.program()
    token = await inode.token()
    await program.asked("take", token)
    for used in (token, "", "f" * 64):
        with refused(Reason.TOKEN_UNKNOWN, errno="ENOENT"):
            await program.asked("take", used)
    # The connection stays, and so does what came through it.
    assert (await program.asked("fstat"))["st_size"] == SIZE_2M
    assert (await inode.get()).host_views_open == 1


async def test_a_guest_token_is_for_one_pid_and_only_while_the_vm_is_bound(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    guest, thief = clean_host.program("guest"), clean_host.program("thief")

    async def token() -> str:
        opened = await gmem.open_view(
            name=inode.name, view=pb.VIEW_GUEST, vm=VM, guest_pid=guest.pid
        )
        return opened.token

    one = await token()
    with refused(Reason.TOKEN_DENIED, errno="EACCES"):
        await thief.asked("take", one)
    assert (await inode.get()).guest_views_open == 0
    # Nobody spoilt it for its owner.
    await guest.asked("take", one)
    assert (await inode.get()).guest_views_open == 1

    late = await token()
    await gmem.unbind_memslot(name=inode.name, vm=VM, slot=0)
    with refused(Reason.TOKEN_DENIED, errno="EACCES"):
        await guest.asked("take", late)
    assert (await inode.get()).guest_views_open == 1


# Lists, watchers, capabilities.


async def test_inodes_are_listed_in_pages(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    made = [
        (await gmem.create_guest_memfd(size=PAGE_SIZE, page_size=PAGE_SIZE)).name
        for _ in range(5)
    ]
    scene = Scene(gmem, {})
    pages: list[list[str]] = []
    token = ""
    while not pages or token:
        body = {"page_size": 2, "page_token": token}
        page = await scene.call("ListGuestMemfds", body)
        pages.append([inode.name for inode in page.guest_memfds])
        token = page.next_page_token
        # Whoever comes or goes meanwhile shifts nothing.
        await gmem.delete_guest_memfd(name=pages[-1][0])
    assert pages == [made[:2], made[2:4], made[4:]]


async def test_watchers_hear_of_changes_from_a_revision_on(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    scene = Scene(gmem, {})
    start = (await scene.call("ListGuestMemfds", {})).revision + 1
    inode = await new_inode(clean_host, gmem)
    await inode.fallocate(KEEP, 0, SIZE_2M)
    await inode.convert(0, PAGE_SIZE, private=True)
    await gmem.delete_guest_memfd(name=inode.name)
    heard: list[Any] = []
    async with asyncio.timeout(10), aclosing(gmem.watch(start)) as changes_seen:
        async for response in changes_seen:
            # An empty kind only says how far all was told.
            heard += [event for event in response.events if event.kind]
            if heard and heard[-1].kind == "inode.closed":
                break
    assert [event.kind for event in heard] == [
        "inode.created",
        "inode.bound",
        "inode.fallocated",
        "inode.converted",
        "inode.closed",
    ]
    assert {event.name for event in heard} == {inode.name}
    revisions = [event.revision for event in heard]
    assert revisions == sorted(revisions)
    assert revisions[0] == start


async def test_tokens_are_bounded(tmp_path: Path) -> None:
    async def never() -> list[int]:
        raise AssertionError

    broker = Broker(tmp_path / "broker")
    for _ in range(TOKENS_MAX):
        broker.mint(never)
    with refused(Reason.LIMIT_REACHED, "4096", "take some, or wait", errno="ENOMEM"):
        broker.mint(never)
    await broker.stop()


async def test_capabilities_say_what_enforces_them(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    capabilities = await gmem.get_capabilities()
    assert list(capabilities.page_sizes) == sorted(PAGE_SIZES)
    assert Lineage.RFC_V1.value in capabilities.lineages
    enforced_by = (capabilities.data_plane, capabilities.mapped_source)
    assert enforced_by == (clean_host.backend.value, "pagemap")
    assert capabilities.broker_path == str(clean_host.run_dir / "guest_memfd.broker")
