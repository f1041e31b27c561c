"""What the wire does to streams: exits and answers, cancels, stops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from gmem.api.vmm.v1 import vmm_pb2
from gmem.client import VcpuRun, VmmClient, program
from gmem.uapi.errors import InUse, NoSuchObject, Reason, TransportError
from tests.support.wire import Partial, serve_vmm

VM = "hosts/host0/vms/a"


class Vmm(Partial):
    """Runs a program that exits once per instruction; tells when its stream ended."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.values: list[int] = []

    async def Run(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        try:
            start = (await anext(request_iterator)).start
            if start.vm != VM:
                raise NoSuchObject(Reason.VM_UNKNOWN, f"no VM {start.vm}; create it")
            for index, instruction in enumerate(start.program):
                response = vmm_pb2.RunResponse(instruction=index)
                if instruction.HasField("halt"):
                    response.hlt.SetInParent()
                else:
                    response.hypercall.nr = instruction.hypercall.nr
                yield response
                if not instruction.HasField("halt"):
                    answer = await anext(request_iterator)
                    self.values.append(answer.resume.value)
        finally:
            self.ended.set()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            while True:
                yield vmm_pb2.WatchResponse(revision=1)
                if request.start_revision:
                    await asyncio.sleep(3600)
        finally:
            self.ended.set()


PROGRAM = [program.hypercall(12, 0, 1, 16), program.hypercall(13), program.halt()]


async def ended(run: VcpuRun) -> None:
    while run._call is None or not run._call.done():
        await asyncio.sleep(0.01)


async def test_run_is_a_stream_of_exits_and_answers(tmp_path: Path) -> None:
    servicer = Vmm()
    async with (
        serve_vmm(servicer, tmp_path) as runtime,
        VmmClient(runtime.target) as client,
        client.run(vm=VM, program=PROGRAM) as run,
    ):
        kinds = []
        async for response in run.exits():
            kinds.append(response.WhichOneof("exit"))
            if kinds[-1] == "hypercall":
                await run.resume(40 + len(kinds))
    assert kinds == ["hypercall", "hypercall", "hlt"]
    assert servicer.values == [41, 42]


async def test_a_refused_run_raises_the_reason_where_the_caller_is(
    tmp_path: Path,
) -> None:
    async with (
        serve_vmm(Vmm(), tmp_path) as runtime,
        VmmClient(runtime.target) as client,
    ):
        with pytest.raises(NoSuchObject, match="no VM b"):
            async with client.run(vm="b", program=PROGRAM) as run:
                await anext(run.exits())
        with pytest.raises(NoSuchObject, match="no VM b"):
            async with client.run(vm="b", program=PROGRAM) as run:
                await ended(run)
                await run.resume()


async def test_a_program_that_is_over_cannot_be_resumed(tmp_path: Path) -> None:
    async with (
        serve_vmm(Vmm(), tmp_path) as runtime,
        VmmClient(runtime.target) as client,
        client.run(vm=VM, program=[program.halt()]) as run,
    ):
        assert await run.results() == []
        await ended(run)
        with pytest.raises(InUse) as caught:
            await run.resume()
        assert caught.value.reason is Reason.STATE_WRONG


async def test_a_run_without_a_service_names_it(tmp_path: Path) -> None:
    async with VmmClient(f"unix:{tmp_path}/vmm.sock") as client:
        with pytest.raises(TransportError, match="vmm at unix:"):
            async with client.run(vm=VM, program=PROGRAM) as run:
                await anext(run.exits())


async def test_a_cancelled_task_ends_its_run_at_the_server_within_a_second(
    tmp_path: Path,
) -> None:
    servicer = Vmm()
    exited = asyncio.Event()

    async def use(client: VmmClient) -> None:
        async with client.run(vm=VM, program=PROGRAM) as run:
            async for _exit in run.exits():
                exited.set()  # and never resume: both sides wait now

    async with (
        serve_vmm(servicer, tmp_path) as runtime,
        VmmClient(runtime.target) as client,
    ):
        using = asyncio.create_task(use(client))
        await exited.wait()
        assert not servicer.ended.is_set()
        using.cancel()
        await asyncio.wait_for(servicer.ended.wait(), 1.0)
        with pytest.raises(asyncio.CancelledError):
            await using


async def test_leaving_a_run_in_the_middle_ends_it_at_the_server(
    tmp_path: Path,
) -> None:
    servicer = Vmm()
    async with (
        serve_vmm(servicer, tmp_path) as runtime,
        VmmClient(runtime.target) as client,
    ):
        async with client.run(vm=VM, program=PROGRAM) as run:
            exits = run.exits()
            await anext(exits)
        # `run` and `exits` are alive still: nothing is left to the collector.
        await asyncio.wait_for(servicer.ended.wait(), 1.0)
        await exits.aclose()


@pytest.mark.parametrize("start_revision", [0, 1], ids=["while writing", "while idle"])
async def test_a_closed_watch_ends_at_the_server_within_a_second(
    tmp_path: Path, start_revision: int
) -> None:
    servicer = Vmm()
    async with (
        serve_vmm(servicer, tmp_path) as runtime,
        VmmClient(runtime.target) as client,
    ):
        async with aclosing(client.watch(start_revision)) as watching:
            assert (await anext(watching)).revision == 1
        await asyncio.wait_for(servicer.ended.wait(), 1.0)


async def test_a_stop_ends_an_open_stream_within_its_grace(tmp_path: Path) -> None:
    servicer = Vmm()
    async with VmmClient(f"unix:{tmp_path}/vmm.sock") as client:
        async with serve_vmm(servicer, tmp_path):
            watching = client.watch(1)
            await anext(watching)
            started = time.monotonic()
        assert servicer.ended.is_set()
        assert time.monotonic() - started < 0.9  # the grace is 1 s
        with pytest.raises(TransportError, match="told to stop"):
            await anext(watching)
