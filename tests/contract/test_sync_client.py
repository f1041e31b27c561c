"""The blocking clients: the same calls and errors, one thread, none left behind."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from gmem import client as aio
from gmem.client import sync
from gmem.client.errors import Exhausted, Reason
from gmem.uapi.pages import SIZE_1G, SIZE_2M
from tests.contract.allocators import serving_memory, small_host

PAIRS = [
    (sync.HostAllocatorClient, aio.HostAllocatorClient),
    (sync.GuestMemfdClient, aio.GuestMemfdClient),
    (sync.VmmClient, aio.VmmClient),
]


@pytest.fixture
def target(tmp_path: Path) -> Iterator[str]:
    """A service in a thread of its own, as another process would be."""
    started, loop = threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()
    targets: list[str] = []

    async def serve() -> None:
        async with serving_memory(small_host(), tmp_path) as runtime:
            targets.append(runtime.target)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(30)
    yield targets[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(30)
    loop.close()


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "gmem-client"]


def test_calls_block_and_errors_are_the_same(target: str) -> None:
    with sync.HostAllocatorClient(target, client="me") as allocator:
        handle = allocator.reserve(page_size=SIZE_2M, num_pages=2)
        (folio,) = allocator.allocate(handle=handle, page_size=SIZE_2M)
        assert folio.order == 9
        with pytest.raises(Exhausted) as caught:
            allocator.reserve(page_size=SIZE_1G, num_pages=99)
        assert caught.value.reason is Reason.POOL_EMPTY
        allocator.free(handle=handle, folios=[folio])
        assert [claim.handle for claim in allocator.list_reservations()] == [handle]


def test_a_stream_is_an_iterator(target: str) -> None:
    with sync.HostAllocatorClient(target) as allocator:
        allocator.update_pool(page_size=SIZE_2M, nr_huge_pages=1)
        with closing(allocator.watch(start_revision=1)) as changes:
            # Progress notifications have no kind.
            kinds = (event.kind for change in changes for event in change.events)
            assert next(filter(None, kinds)) == "pool.resized"


def test_clients_share_one_thread_which_ends_with_the_last(target: str) -> None:
    with sync.HostAllocatorClient(target) as one:
        with sync.HostAllocatorClient(target) as two:
            assert threads() == ["gmem-client"]
            two.get_statistics()
        answers = []
        other = threading.Thread(target=lambda: answers.append(one.list_pools()))
        other.start()
        other.join(30)
        assert len(answers[0]) == 2
    assert threads() == []


def test_a_client_that_is_not_open_says_so() -> None:
    client = sync.VmmClient("unix:/nowhere")
    with pytest.raises(RuntimeError, match="inside `with`"):
        client.list_vms()


async def test_inside_a_loop_it_refuses_to_block() -> None:
    with pytest.raises(RuntimeError, match=r"use gmem\.client here"):
        sync.VmmClient("unix:/nowhere").__enter__()
    assert threads() == []


@pytest.mark.parametrize(
    ("blocking", "awaited"), PAIRS, ids=[a.__name__ for a, _ in PAIRS]
)
def test_no_method_is_missing(blocking: type, awaited: type) -> None:
    def public(one: type) -> set[str]:
        return {
            name
            for name, value in vars(one).items()
            if inspect.isfunction(value) and not name.startswith("_")
        }

    assert public(blocking) == public(awaited)
    for name in public(awaited) - {"watch", "run"}:
        assert getattr(blocking, name).__doc__ == getattr(awaited, name).__doc__
