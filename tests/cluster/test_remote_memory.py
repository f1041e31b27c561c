"""ReadRange and WriteRange beside processes that have the same pages mapped."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.client import GuestMemfdClient, HostAllocatorClient, RemoteMemory
from gmem.ctl import launcher
from gmem.ctl.directories import HostDirectory
from gmem.ctl.state import HostState
from gmem.runtime.backend import Backend
from gmem.runtime.metadata import GO_KEY
from gmem.uapi.errors import Reason
from gmem.uapi.flags import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, SIZE_2M
from tests.support.backends import BOTH
from tests.support.hosts import (
    HOST,
    Host,
    Inode,
    counters,
    new_inode,
    refused,
    running_host,
)

pytestmark = pytest.mark.fuse
BACKENDS = BOTH

MIB = 1 << 20
PUNCH = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
SIZES = pytest.mark.parametrize("page_size", [PAGE_SIZE, SIZE_2M, SIZE_1G])


def remote(inode: Inode) -> RemoteMemory:
    return RemoteMemory(inode.gmem, inode.name)


async def pages_of(
    host: Host, gmem: GuestMemfdClient, page_size: int, size: int = 4 * MIB
) -> Inode:
    pages = max(1, size // page_size)
    return await new_inode(host, gmem, page_size=page_size, pages=pages)


# Coherence.


@SIZES
async def test_what_a_process_stored_through_its_mapping_is_read(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    inode = await pages_of(clean_host, gmem, page_size)
    client = await inode.mapped_by()
    for value in (1, 2, 3):
        # Its page stays mapped, and dirty, from round to round.
        await client.asked("raw_store", MIB - 1, value)
        await client.asked("raw_store", MIB, value + 10)
        assert await remote(inode).read(MIB - 1, 2) == bytes([value, value + 10])
    assert await client.asked("raw_load", MIB) == 13


@SIZES
async def test_what_was_written_is_found_through_a_mapping(
    clean_host: Host, gmem: GuestMemfdClient, page_size: int
) -> None:
    inode = await pages_of(clean_host, gmem, page_size)
    client = await inode.mapped_by()
    # Cached and clean, cached and dirty, not cached.
    await client.asked("raw_load", PAGE_SIZE)
    await client.asked("raw_store", 2 * PAGE_SIZE, 0x77)
    await remote(inode).write(PAGE_SIZE + 7, b"x" * (3 * PAGE_SIZE))
    expected = [(PAGE_SIZE + 6, 0), (PAGE_SIZE + 7, 0x78), (2 * PAGE_SIZE, 0x78)]
    expected += [(4 * PAGE_SIZE + 6, 0x78), (4 * PAGE_SIZE + 7, 0)]
    assert [(at, await client.asked("raw_load", at)) for at, _ in expected] == expected


async def test_bytes_beside_what_is_written_stay_those_of_the_mapping(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by()
    for at in (0, 99, 103, 4095):
        await client.asked("raw_store", at, 0x55)
    await remote(inode).write(100, b"abc")
    await client.asked("dont_need")
    whole = await remote(inode).read(0, PAGE_SIZE)
    assert whole[99:104] == b"\x55abc\x55"
    assert (whole[0], whole[4095]) == (0x55, 0x55)
    assert whole.count(0x55) == 4


async def test_a_hole_takes_a_folio_and_reads_as_zeros(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem, pages=2)
    await remote(inode).write(0, b"\xaa" * SIZE_2M)
    await inode.fallocate(PUNCH, 0, SIZE_2M)
    assert (await inode.get()).split_folios == 0
    assert await remote(inode).read(5, 100) == bytes(100)
    # A folio is split as soon as a page of it is shared.
    assert (await inode.get()).split_folios == 1


async def test_more_than_one_chunk_comes_whole_and_in_order(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem, pages=4)
    data = random.Random(4).randbytes(5 * MIB + 12345)
    at = 3 * PAGE_SIZE - 5
    await remote(inode).write(at, data)
    stream = gmem.read_range(name=inode.name, offset=at, size=len(data))
    chunks = [chunk async for chunk in stream]
    assert b"".join(chunks) == data
    assert [len(chunk) for chunk in chunks[1:-1]] == [MIB] * 4
    assert max(map(len, chunks)) <= MIB
    client = await inode.mapped_by()
    assert (
        bytes.fromhex(await client.asked("read", at + 5 * MIB, 9))
        == data[5 * MIB : 5 * MIB + 9]
    )


async def test_both_hammer_the_same_pages_and_no_byte_is_lost(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    client = await inode.mapped_by()
    pages = [n * PAGE_SIZE for n in (0, 1, 2, 40)]
    # The process counts in the first word of each page, the writer in the second.
    client.tell("count_up", pages)
    memory = remote(inode)
    seen = dict.fromkeys(pages, 0)
    for count in range(1, 101):
        for at in pages:
            word = await memory.read(at, 16)
            theirs = int.from_bytes(word[:8], "little")
            assert theirs >= seen[at], "a store was taken back"
            seen[at] = theirs
            assert int.from_bytes(word[8:], "little") == count - 1, "a write was lost"
            await memory.write(at + 8, count.to_bytes(8, "little"))
    client.tell("pages")
    rounds = (await asyncio.to_thread(client.heard))["rounds"]
    await asyncio.to_thread(client.heard)
    assert await client.asked("counters", pages) == [rounds] * 4
    for at in pages:
        word = await memory.read(at, 16)
        assert int.from_bytes(word[:8], "little") == rounds
        assert int.from_bytes(word[8:], "little") == 100


# Refusals.


async def test_a_private_page_is_refused_before_a_byte_is_moved(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem, pages=2)
    await inode.convert(3 * MIB, PAGE_SIZE, private=True)
    chunks: list[bytes] = []
    with refused(Reason.PAGE_NOT_FAULTABLE, "convert it to shared") as caught:
        stream = gmem.read_range(name=inode.name, offset=1, size=4 * MIB - 1)
        chunks.extend([chunk async for chunk in stream])
    assert chunks == []
    assert caught[0].numbers["error_offset"] == 3 * MIB
    with refused(Reason.PAGE_NOT_FAULTABLE) as caught:
        await remote(inode).write(MIB, b"y" * (3 * MIB))
    assert caught[0].numbers["error_offset"] == 3 * MIB
    assert await remote(inode).read(MIB, PAGE_SIZE) == bytes(PAGE_SIZE)


async def test_a_page_that_becomes_private_ends_a_read_after_whole_chunks(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem, page_size=SIZE_1G)
    await remote(inode).write(0, b"\x11" * MIB)
    stream = gmem.read_range(name=inode.name, offset=0, size=512 * MIB)
    assert await anext(stream) == b"\x11" * MIB
    # A reader that does not read holds no lock: this is not refused, nor does it wait.
    await inode.convert(500 * MIB, PAGE_SIZE, private=True)
    came = MIB
    with refused(Reason.PAGE_NOT_FAULTABLE) as caught:
        async for chunk in stream:
            came += len(chunk)
    assert caught[0].numbers["error_offset"] == 500 * MIB
    assert came == 500 * MIB


async def test_a_page_that_becomes_private_ends_a_write_and_tells_what_is_stored(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem, pages=2)
    more = asyncio.Event()
    call = writing(
        gmem,
        header_of(gmem, inode, 0, 3 * MIB),
        [b"z" * MIB, more, b"z" * MIB, b"z" * MIB],
    )
    await stored(inode, 0, b"z" * MIB)
    await inode.convert(MIB + PAGE_SIZE, PAGE_SIZE, private=True)
    more.set()
    with refused(Reason.PAGE_NOT_FAULTABLE) as caught:
        await call
    assert caught[0].numbers["error_offset"] == MIB + PAGE_SIZE
    assert caught[0].numbers["stored"] == MIB
    await inode.convert(MIB + PAGE_SIZE, PAGE_SIZE, private=False)
    assert await remote(inode).read(0, MIB + 1) == b"z" * MIB + bytes(1)


async def test_a_short_stream_says_how_much_is_stored_and_a_long_one_too(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    for parts in ([b"a" * 100], [b"a" * 100, b"b" * 101]):
        with refused(Reason.STREAM_LENGTH) as caught:
            await writing(gmem, header_of(gmem, inode, 0, 200), parts)
        assert caught[0].numbers["stored"] == 100
    assert await remote(inode).read(0, 101) == b"a" * 100 + bytes(1)


# Callers that go away.


async def test_a_writer_that_goes_away_leaves_what_was_stored_and_no_lock(
    clean_host: Host, gmem: GuestMemfdClient, allocator: HostAllocatorClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    never = asyncio.Event()
    header = header_of(gmem, inode, 0, 2 * PAGE_SIZE)
    async with clean_host.clients("other") as (_, leaving):
        call = writing(leaving, header, [b"1" * 9, never])
        await stored(inode, 0, b"1" * 9)
        call.cancel()
        await asyncio.wait([call])
    await inode.convert(0, SIZE_2M, private=True)
    await inode.convert(0, SIZE_2M, private=False)
    # Nothing is kept of it: the same request_id writes all of it now.
    parts = [b"1" * PAGE_SIZE, b"2" * PAGE_SIZE]
    assert await writing(gmem, header, parts) == 2 * PAGE_SIZE
    assert await remote(inode).read(0, 2 * PAGE_SIZE) == b"".join(parts)


async def test_a_repeat_takes_over_from_an_attempt_that_stands_still(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem)
    never = asyncio.Event()
    header = header_of(gmem, inode, 0, 20)
    first = writing(gmem, header, [b"1" * 10, never])
    await stored(inode, 0, b"1" * 10)
    assert await writing(gmem, header, [b"2" * 20]) == 20
    first.cancel()
    await asyncio.wait([first])
    assert await remote(inode).read(0, 20) == b"2" * 20
    # And a repeat of what is finished changes nothing.
    await remote(inode).write(0, b"3" * 20)
    assert await writing(gmem, header, [b"2" * 20]) == 20
    assert await remote(inode).read(0, 20) == b"3" * 20
    header.size = 21
    with refused(Reason.REQUEST_ID_REUSED):
        await writing(gmem, header, [b"2" * 21])


async def test_a_reader_that_goes_away_leaves_no_lock_and_no_use(
    clean_host: Host, gmem: GuestMemfdClient, allocator: HostAllocatorClient
) -> None:
    before = await counters(allocator)
    inode = await new_inode(clean_host, gmem, page_size=SIZE_1G)
    async with clean_host.clients("other") as (_, leaving):
        stream = leaving.read_range(name=inode.name, offset=0, size=SIZE_1G)
        await anext(stream)
        await stream.aclose()
    await inode.convert(0, SIZE_1G, private=True)
    await gmem.delete_guest_memfd(name=inode.name)
    assert await counters(allocator) == before


async def test_many_readers_and_a_converter_at_once(
    clean_host: Host, gmem: GuestMemfdClient
) -> None:
    inode = await new_inode(clean_host, gmem, pages=4)
    data = random.Random(7).randbytes(8 * MIB)
    await remote(inode).write(0, data)
    left = 4 * 8

    async def read_often() -> None:
        nonlocal left
        for _ in range(8):
            # What lies before the page that is converted is the same at every moment.
            assert (
                await remote(inode).read(MIB - 1, 4 * MIB) == data[MIB - 1 :][: 4 * MIB]
            )
            left -= 1

    async def convert_often() -> int:
        times = 0
        while left:
            await inode.convert(5 * MIB, PAGE_SIZE, private=True)
            await inode.convert(5 * MIB, PAGE_SIZE, private=False)
            times += 1
        return times

    *_, times = await asyncio.gather(*(read_often() for _ in range(4)), convert_often())
    assert times


# Crashes.


async def test_a_killed_service_is_not_felt_by_reader_or_writer(
    own_host: Host,
) -> None:
    async with own_host.clients() as (_, gmem):
        inode = await new_inode(own_host, gmem, pages=8)
        data = random.Random(3).randbytes(16 * MIB)
        write = asyncio.create_task(remote(inode).write(0, data))
        await stored(inode, 0, data[:9])
        own_host.kill("guest_memfd")
        await write
        read = asyncio.create_task(remote(inode).read(0, len(data)))
        await asyncio.sleep(0.01)
        own_host.kill("guest_memfd")
        assert await read == data


# Over a network, and from a shell.


async def test_a_client_of_another_machine_comes_over_tcp(
    monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{probe.getsockname()[1]}"
    usual = launcher._service

    def listening(
        directory: HostDirectory, state: HostState, name: str, **held: bool
    ) -> launcher._Service:
        service = usual(directory, state, name, **held)
        if name != "guest_memfd":
            return service
        arguments = (*service.arguments, "--listen", target)
        return dataclasses.replace(service, arguments=arguments, target=target)

    monkeypatch.setattr(launcher, "_service", listening)
    running = running_host(backend=backend)
    host = await asyncio.to_thread(running.__enter__)
    try:
        assert host.target("guest_memfd") == target
        async with host.clients() as (_, gmem):
            inode = await new_inode(host, gmem, pages=4)
            client = await inode.mapped_by()
            data = random.Random(6).randbytes(5 * MIB)
            await remote(inode).write(7, data)
            at = 5 * MIB + 6
            assert await client.asked("raw_load", at) == data[-1]
            await client.asked("raw_store", at, data[-1] ^ 1)
            expected = data[:-1] + bytes([data[-1] ^ 1])
            assert await remote(inode).read(7, len(data)) == expected
            await inode.convert(6 * MIB, PAGE_SIZE, private=True)
            with refused(Reason.PAGE_NOT_FAULTABLE):
                await remote(inode).read(6 * MIB, 1)
    finally:
        await asyncio.to_thread(running.__exit__, None, None, None)


def test_the_command_line_writes_a_file_and_reads_it_back(own_host: Host) -> None:
    inode = asyncio.run(an_inode(own_host))
    data = random.Random(5).randbytes(2 * MIB + 3)
    (own_host.run_dir / "bytes").write_bytes(data)
    where = ("--host", HOST, "--run-dir", str(own_host.directory.base))
    ctl = (sys.executable, "-m", "gmem.ctl", "inode")

    def run(*words: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [*ctl, *words, *where]
        return subprocess.run(command, input=given, capture_output=True, check=False)

    wrote = run("write", inode, "0x1001", str(own_host.run_dir / "bytes"))
    assert (wrote.returncode, wrote.stderr) == (0, b"")
    assert b"written at 0x1001" in wrote.stdout
    assert run("read", inode, "4097", str(len(data))).stdout == data
    assert run("write", inode, "0", given=b"piped").returncode == 0
    found = json.loads(run("read", inode, "0", "6", "--json").stdout)
    assert base64.b64decode(found["base64"]) == b"piped\0"
    refused_ = run("read", inode, "4M", "1")
    assert refused_.returncode == 1
    assert b"past the end" in refused_.stderr
    for words in (("read", inode, "x", "1"), ("write", inode, "0", "/no/file")):
        assert run(*words).returncode == 2


async def an_inode(host: Host) -> str:
    async with host.clients() as (_, gmem):
        return (await new_inode(host, gmem, pages=2)).name


# Tools.


def header_of(
    gmem: GuestMemfdClient, inode: Inode, offset: int, size: int
) -> pb.WriteRangeHeader:
    return pb.WriteRangeHeader(
        request_id=gmem.new_request_id(), name=inode.name, offset=offset, size=size
    )


def writing(
    gmem: GuestMemfdClient,
    header: pb.WriteRangeHeader,
    parts: Sequence[bytes | asyncio.Event],
) -> asyncio.Task[int]:
    """Begin a WriteRange whose parts come when a test says so."""

    async def attempt(_metadata: Any) -> pb.WriteRangeResponse:
        stream = gmem._stub.WriteRange()
        try:
            await stream.write(pb.WriteRangeRequest(header=header))
            go = (await stream.initial_metadata()).get(GO_KEY)
            for part in parts if go else ():
                if isinstance(part, asyncio.Event):
                    await part.wait()
                else:
                    await stream.write(pb.WriteRangeRequest(data=part))
            if go:
                await stream.done_writing()
            return await stream
        finally:
            stream.cancel()

    async def call() -> int:
        patience = gmem.connection.patience
        repeated = gmem.connection._repeated(attempt, patience, fenced=False)
        return (await repeated).stored

    return asyncio.create_task(call())


async def stored(inode: Inode, offset: int, data: bytes) -> None:
    """Wait until bytes are there."""
    while await remote(inode).read(offset, len(data)) != data:
        await asyncio.sleep(0.01)
