"""The guest process end to end: programs in, exits and results out; no FUSE."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gmem.api.guest_memfd.v1 import guest_memfd_pb2
from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.client.program import (
    PRIVATE,
    SHARED,
    fill,
    halt,
    hash_range,
    hypercall,
    load,
    map_gpa_range,
    out,
    ring,
    store,
    verify,
)
from gmem.device import RingDevice
from gmem.guest_memfd.vmm_link import NoticeSocket
from gmem.uapi.errors import Errno, InUse, KernelError, Reason, make_error
from gmem.uapi.pages import PAGE_SIZE, SIZE_2M
from tests.support.vmm_host import GPA, SIZE, VmmHost, results, vmm_host


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[VmmHost]:
    async with vmm_host(tmp_path) as made:
        yield made


async def test_shared_memory_is_the_userspace_side(host: VmmHost) -> None:
    shared = await host.boot()
    shared.write(PAGE_SIZE - 3, b"from the host")

    exits = await host.run(
        load(GPA + PAGE_SIZE - 3, 13), store(GPA + 5, b"from the guest"), halt()
    )

    assert [e.WhichOneof("exit") for e in exits] == ["hlt"]
    assert [r.data for r in results(exits)] == [b"from the host"]
    assert shared.read(5, 14) == b"from the guest"
    stage2 = await host.client.get_stage2(host.vm)
    assert (stage2.entries_1g, stage2.entries_2m, stage2.entries_4k) == (0, 0, 2)


async def test_private_memory_is_the_guest_view(host: VmmHost) -> None:
    shared = await host.boot()
    await host.convert(0, SIZE, private=True)

    await host.run(fill(GPA, 2 * PAGE_SIZE, 0x5A), halt())

    assert os.pread(host.file.guest, 2 * PAGE_SIZE, 0) == b"\x5a" * 2 * PAGE_SIZE
    assert shared.read(0, PAGE_SIZE) == bytes(PAGE_SIZE)


async def test_verify_counts_what_differs(host: VmmHost) -> None:
    shared = await host.boot()
    shared.write(0, b"\x07" * SIZE)
    shared.write(PAGE_SIZE + 9, b"xy")

    exits = await host.run(verify(GPA, SIZE, 7), verify(GPA, PAGE_SIZE, 7))

    first, second = results(exits)
    assert (first.count, first.first_gpa) == (2, GPA + PAGE_SIZE + 9)
    assert (second.instruction, second.count) == (1, 0)
    assert exits[-1].instruction == 2  # ran off its end


async def test_hash_of_64m_is_fast(host: VmmHost) -> None:
    size = 64 << 20
    await host.boot(size=size, flags=2 | 21 << 26)
    await host.convert(0, size, private=True)
    data = os.urandom(1 << 20) * 64
    assert os.pwrite(host.file.guest, data, 0) == size

    started = time.monotonic()
    exits = await host.run(hash_range(GPA, size), halt())
    seconds = time.monotonic() - started

    assert results(exits)[0].data == hashlib.sha256(data).digest()
    assert (await host.client.get_stage2(host.vm)).entries_2m == 32
    assert seconds < 20, seconds


async def test_hypercall_leaves_and_gets_its_answer(host: VmmHost) -> None:
    await host.boot()

    exits = await host.run(
        hypercall(99, 1, 2**63),
        map_gpa_range(GPA, 3, private=True),
        answers=[5, 2**64 - 1],
    )

    assert exits[0].hypercall == pb.HypercallExit(nr=99, args=[1, 2**63])
    assert exits[1].hypercall == pb.HypercallExit(nr=12, args=[GPA, 3, 16])
    assert [r.value for r in results(exits)] == [5, 2**64 - 1]


async def test_out_leaves_with_io(host: VmmHost) -> None:
    await host.boot()
    exits = await host.run(out(0x3F8, 65), halt())
    assert exits[0].io == pb.IoExit(port=0x3F8, value=65)


async def test_no_memslot_is_mmio_in_pieces_of_8(host: VmmHost) -> None:
    await host.boot()
    gpa = GPA + SIZE + 6

    exits = await host.run(
        store(gpa, b"abcdef"), load(gpa, 4), answers=[0, 0, 0x6261, 0x64]
    )

    mmio = [e.mmio for e in exits[:-1]]
    assert [(m.gpa, m.len, m.is_write, m.data) for m in mmio] == [
        (gpa, 2, True, b"ab"),
        (gpa + 2, 4, True, b"cdef"),
        (gpa, 2, False, b""),
        (gpa + 2, 2, False, b""),
    ]
    assert results(exits)[0].data == b"abd\0"


async def test_write_to_a_read_only_memslot_is_mmio(host: VmmHost) -> None:
    await host.boot()
    rom = await host.share(PAGE_SIZE)
    rom.write(0, b"rom")
    await host.set_slot(1, GPA + SIZE, PAGE_SIZE, rom, flags=2)

    exits = await host.run(
        load(GPA + SIZE, 3), store(GPA + SIZE, b"x"), load(GPA + SIZE, 3)
    )

    assert exits[0].mmio.is_write
    assert [r.data for r in results(exits)] == [b"rom", b"rom"]


async def test_wrong_kind_of_access_leaves_until_it_is_converted(host: VmmHost) -> None:
    await host.boot()
    run = host.client.run(
        vm=host.vm,
        program=[
            store(GPA + 5000, b"secret", access=PRIVATE),
            load(GPA, 1, access=SHARED),
        ],
        policy=pb.POLICY_NONE,
    )
    async with run:
        exits = run.exits()
        reached = await anext(exits)
        fault = reached.memory_fault
        assert (fault.flags, fault.gpa, fault.size, fault.errno) == (
            8,
            GPA + PAGE_SIZE,
            PAGE_SIZE,
            Errno.EFAULT,
        )
        await run.resume()
        assert (await anext(exits)).memory_fault == fault
        await host.convert(PAGE_SIZE, PAGE_SIZE, private=True)
        await run.resume()
        assert (await anext(exits)).WhichOneof("exit") == "hlt"
    assert os.pread(host.file.guest, 6, 5000) == b"secret"


async def test_policy_converts_what_the_guest_asks_for(host: VmmHost) -> None:
    await host.boot()

    exits = await host.run(
        map_gpa_range(GPA, 2, private=True),
        store(GPA, b"private"),
        store(GPA + 3 * PAGE_SIZE, b"also", access=PRIVATE),
        load(GPA, 4, access=SHARED),
        policy=pb.POLICY_CONVERT,
    )

    assert [e.WhichOneof("exit") for e in exits] == ["hlt"]
    assert results(exits)[0].value == 0
    asked = host.files.asked(guest_memfd_pb2.ConvertRangeRequest)
    assert [(r.ranges[0].offset, r.ranges[0].size, r.to_shared) for r in asked] == [
        (0, 2 * PAGE_SIZE, False),
        (3 * PAGE_SIZE, PAGE_SIZE, False),
        (0, PAGE_SIZE, True),
    ]


async def test_policy_hands_out_what_was_refused(host: VmmHost) -> None:
    await host.boot()
    host.files.refuse["ConvertRange"] = make_error(Reason.PAGE_IN_USE, "mapped by 7")

    exits = await host.run(
        map_gpa_range(GPA, 2, private=True),
        policy=pb.POLICY_CONVERT,
        answers=[2**64 - 22],
    )
    assert exits[0].hypercall.nr == 12
    assert results(exits)[0].value == 2**64 - 22
    run = host.client.run(vm=host.vm, program=[load(GPA, 1, access=PRIVATE)])
    async with run:
        reached = await anext(run.exits())
        assert reached.memory_fault.reason == "PAGE_IN_USE"


async def test_refused_get_pfn_is_a_memory_fault_with_its_errno(host: VmmHost) -> None:
    await host.boot()
    await host.convert(0, SIZE, private=True)
    host.files.refuse["GetPfn"] = make_error(Reason.SUBPOOL_EMPTY, "all 1 used")

    run = host.client.run(vm=host.vm, program=[load(GPA, 1)])
    async with run:
        exits = run.exits()
        fault = (await anext(exits)).memory_fault
        assert (fault.errno, fault.reason, fault.flags) == (12, "SUBPOOL_EMPTY", 8)
        del host.files.refuse["GetPfn"]
        await run.resume()
        assert (await anext(exits)).WhichOneof("exit") == "hlt"


async def test_page_that_is_cut_off_is_a_fault_and_no_death(host: VmmHost) -> None:
    shared = await host.boot()
    shared.write(0, b"stays" * 1000)
    await host.run(fill(GPA, 2 * PAGE_SIZE, 1))
    os.ftruncate(shared.fd, PAGE_SIZE)

    run = host.client.run(
        vm=host.vm, program=[fill(GPA, 2 * PAGE_SIZE, 2), load(GPA, 1)]
    )
    async with run:
        exits = run.exits()
        fault = (await anext(exits)).memory_fault
        assert (fault.gpa, fault.errno, fault.flags) == (GPA + PAGE_SIZE, 14, 0)
        assert shared.read(0, PAGE_SIZE) == b"\2" * PAGE_SIZE
        os.ftruncate(shared.fd, SIZE)
        await run.resume()
        assert (await anext(exits)).WhichOneof("exit") == "hlt"
    assert shared.read(PAGE_SIZE, PAGE_SIZE) == b"\2" * PAGE_SIZE
    assert (await host.client.get_vm(host.vm)).guest_alive


async def test_deleted_memslot_is_a_private_fault(host: VmmHost) -> None:
    await host.boot()
    await host.convert(0, SIZE, private=True)
    run = host.client.run(vm=host.vm, program=[load(GPA, 8), out(1, 1), load(GPA, 8)])
    async with run:
        exits = run.exits()
        assert (await anext(exits)).WhichOneof("exit") == "io"
        await host.set_slot(0, GPA, 0, None)
        await run.resume()
        fault = (await anext(exits)).memory_fault
        assert (fault.flags, fault.gpa, fault.size) == (8, GPA, PAGE_SIZE)


async def test_ring_exchanges_requests_with_a_device(host: VmmHost) -> None:
    shared = await host.boot()
    device = RingDevice(shared)
    stop = asyncio.Event()

    async def serve_ring() -> int:
        answered = 0
        while not stop.is_set():
            answered += device.poll()
            await asyncio.sleep(0.001)
        return answered

    serving = asyncio.create_task(serve_ring())
    exits = await host.run(ring(GPA, 4 * PAGE_SIZE, 100), ring(GPA, 4 * PAGE_SIZE, 7))
    stop.set()

    assert [(r.count, r.value) for r in results(exits)] == [(100, 0), (7, 0)]
    assert await serving == 107


async def test_ring_without_a_device_gives_up(host: VmmHost) -> None:
    await host.boot()
    exits = await host.run(ring(GPA, 2 * PAGE_SIZE, 3, timeout_ms=50))
    assert [(r.count, r.value) for r in results(exits)] == [(0, 0)]


async def test_accesses_wait_for_a_conversion_and_see_its_outcome(
    host: VmmHost,
) -> None:
    shared = await host.boot()
    shared.write(0, b"shared!")
    assert os.pwrite(host.file.guest, b"private", 0) == 7
    await host.run(load(GPA, 7))
    host.files.may_convert.clear()

    converting = asyncio.create_task(host.convert(0, PAGE_SIZE, private=True))
    await host.files.converting.wait()
    running = asyncio.create_task(host.run(load(GPA, 7)))
    await asyncio.sleep(0.3)
    assert not running.done()
    host.files.may_convert.set()
    await converting

    assert results(await running)[0].data == b"private"


async def test_an_ended_stream_frees_the_vcpu(host: VmmHost) -> None:
    shared = await host.boot()
    endless = [fill(GPA, SIZE, 1)] * 4000
    run = host.client.run(vm=host.vm, program=[out(1, 1), *endless])
    async with run:
        await anext(run.exits())
        await run.resume()
        with pytest.raises(InUse) as refused:
            await host.run(halt())
        assert refused.value.reason is Reason.VCPU_RUNNING
        with pytest.raises(InUse) as refused:
            await host.client.delete_vm(name=host.vm)
        assert refused.value.reason is Reason.VCPU_RUNNING

    async with asyncio.timeout(20):
        while True:
            try:
                await host.run(fill(GPA, PAGE_SIZE, 9))
                break
            except InUse:
                await asyncio.sleep(0.02)
    assert shared.read(0, PAGE_SIZE) == b"\x09" * PAGE_SIZE


async def test_killed_guest_is_gone(host: VmmHost) -> None:
    await host.boot()
    vm = await host.client.get_vm(host.vm)
    assert vm.guest_alive
    run = host.client.run(vm=host.vm, program=[out(1, 1), load(GPA, 1), out(2, 2)])
    async with run:
        exits = run.exits()
        await anext(exits)
        os.kill(vm.guest_pid, signal.SIGKILL)
        with pytest.raises(KernelError) as refused:
            await run.resume()
            await anext(exits)
        assert refused.value.reason is Reason.GUEST_GONE

    assert not (await host.client.get_vm(host.vm)).guest_alive
    with pytest.raises(KernelError) as refused:
        await host.run(halt())
    assert refused.value.reason is Reason.GUEST_GONE
    shared = await host.share()
    with pytest.raises(KernelError) as refused:
        await host.set_slot(1, 0, SIZE, shared)
    assert refused.value.reason is Reason.GUEST_GONE
    await host.client.delete_vm(name=host.vm)
    assert await host.client.list_vms() == []


async def test_guest_ends_with_its_vm(host: VmmHost) -> None:
    await host.boot()
    pid = (await host.client.get_vm(host.vm)).guest_pid
    status = Path(f"/proc/{pid}/cmdline").read_bytes()
    assert b"gmem.vmm.guest" in status

    await host.client.delete_vm(name=host.vm)

    assert not Path(f"/proc/{pid}").exists()
    asked = host.files.asked(guest_memfd_pb2.UnbindMemslotRequest)
    assert [(r.name, r.slot) for r in asked] == [(host.name, 0)]


@pytest.mark.parametrize("way", ["gRPC", "broker"])
async def test_invalidation_drops_what_is_mapped(host: VmmHost, way: str) -> None:
    tell = by_grpc(host) if way == "gRPC" else await by_broker(host)
    await host.boot(size=2 * SIZE_2M, flags=2 | 21 << 26)
    await host.convert(0, 2 * SIZE_2M, private=True)
    await host.run(load(GPA, 1), load(GPA + SIZE_2M, 1))
    assert (await host.client.get_stage2(host.vm)).entries_2m == 2

    gfn = (GPA >> 12) + 5
    await tell("begin", gfn)
    stage2 = await host.client.get_stage2(host.vm)
    assert stage2.entries_2m == 1
    running = asyncio.create_task(host.run(load(GPA + 5 * PAGE_SIZE, 1)))
    await asyncio.sleep(0.2)
    assert not running.done()
    await tell("end", gfn)
    await running
    assert (await host.client.get_stage2(host.vm)).entries_2m == 2


Tell = Callable[[str, int], Awaitable[None]]


def by_grpc(host: VmmHost) -> Tell:
    async def tell(edge: str, gfn: int) -> None:
        client = host.client
        begin = edge == "begin"
        call = client.invalidate_begin if begin else client.invalidate_end
        await call(vm=host.vm, gfn=gfn, npages=1)

    return tell


async def by_broker(host: VmmHost) -> Tell:
    hello = {"op": "hello", "client": "guest_memfd", "incarnation": "1"}
    notices = await NoticeSocket.open(host.broker.path, hello, 10)

    async def tell(edge: str, gfn: int) -> None:
        fields = {"edge": edge, "vm": host.vm, "gfn": gfn, "npages": 1}
        await notices.ask({"op": "invalidate", **fields}, 10)
        if edge == "end":
            notices.close("the test is over")

    return tell


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"edge": "middle"}, Reason.ARGUMENT_INVALID),
        ({"edge": None}, Reason.ARGUMENT_INVALID),
        ({"gfn": -1}, Reason.ARGUMENT_INVALID),
        ({"gfn": 1 << 64}, Reason.ARGUMENT_INVALID),
        ({"npages": "many"}, Reason.ARGUMENT_INVALID),
        ({"vm": 7}, Reason.ARGUMENT_INVALID),
        ({"vm": "hosts/h/vms/nobody"}, Reason.VM_UNKNOWN),
    ],
    ids=str,
)
async def test_a_wrong_invalidation_is_refused_and_the_connection_stays(
    host: VmmHost, wrong: dict[str, Any], reason: Reason
) -> None:
    await host.boot()
    hello = {"op": "hello", "client": "guest_memfd", "incarnation": "1"}
    notices = await NoticeSocket.open(host.broker.path, hello, 10)
    right = {"op": "invalidate", "edge": "end", "vm": host.vm, "gfn": 0, "npages": 1}
    with pytest.raises(KernelError) as refused:
        await notices.ask(right | wrong, 10)
    assert refused.value.reason is reason
    await notices.ask(right, 10)
    notices.close("the test is over")


async def test_page_that_is_refused_during_another_invalidation_is_waited_for(
    host: VmmHost,
) -> None:
    """The split of a huge page closes neighbours that the bracket does not cover."""
    await host.boot()
    await host.convert(0, SIZE, private=True)
    await host.run(fill(GPA, SIZE, 3))
    far = GPA >> 12
    await host.client.invalidate_begin(vm=host.vm, gfn=far, npages=1)
    os.ftruncate(host.file.guest, PAGE_SIZE)
    running = asyncio.create_task(host.run(load(GPA + PAGE_SIZE, 1)))
    # Longer than all pauses together: nothing but the bracket holds it.
    await asyncio.sleep(1.0)
    assert not running.done()
    os.ftruncate(host.file.guest, SIZE)
    await host.client.invalidate_end(vm=host.vm, gfn=far, npages=1)
    exits = await running
    assert [e.WhichOneof("exit") for e in exits] == ["hlt"]
    assert results(exits)[0].data == b"\0"
