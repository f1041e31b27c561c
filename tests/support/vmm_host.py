"""A real vmm with real guest processes, over a guest_memfd made of memfds."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.client import VmmClient
from gmem.runtime.broker_client import BrokerClient
from gmem.uapi.flags import KVM_MEM_GUEST_MEMFD
from gmem.uapi.pages import PAGE_SIZE
from gmem.vmm.__main__ import start
from tests.support.fake_guest_memfd import FakeGuestMemfd, MemfdFile, fake_guest_memfd
from tests.support.wire import serve

GPA = 0x4000_0000
SIZE = 64 * PAGE_SIZE


@dataclass
class SharedMemory:
    """A memfd of ours behind a memslot's userspace side."""

    fd: int
    descriptor: str

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self.fd, size, offset)

    def write(self, offset: int, data: bytes) -> None:
        assert os.pwrite(self.fd, data, offset) == len(data)


@dataclass
class VmmHost:
    """One vmm, its client, and the files that its VMs have."""

    client: VmmClient
    files: FakeGuestMemfd
    broker: BrokerClient
    vm: str = ""
    name: str = ""

    @property
    def file(self) -> MemfdFile:
        return self.files.files[self.name]

    async def share(self, size: int = SIZE) -> SharedMemory:
        fd = os.memfd_create("shared", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        descriptor = await asyncio.to_thread(self.broker.give, fd, "shared")
        return SharedMemory(fd, descriptor)

    async def boot(
        self, vm_id: str = "v", size: int = SIZE, flags: int = 0
    ) -> SharedMemory:
        """Make a VM with one memslot at GPA, one vCPU; return its shared side."""
        self.vm = (await self.client.create_vm(vm_id=vm_id)).name
        self.name = await self.client.create_guest_memfd(
            vm=self.vm, size=size, flags=flags
        )
        shared = await self.share(size)
        await self.set_slot(0, GPA, size, shared, name=self.name)
        await self.client.create_vcpu(vm=self.vm, vcpu=0)
        return shared

    async def set_slot(
        self,
        slot: int,
        gpa: int,
        size: int,
        shared: SharedMemory | None,
        *,
        name: str = "",
        flags: int = 0,
    ) -> None:
        side = pb.Userspace(descriptor=shared.descriptor) if shared else None
        await self.client.set_user_memory_region2(
            vm=self.vm,
            slot=slot,
            guest_phys_addr=gpa,
            memory_size=size,
            flags=flags | (KVM_MEM_GUEST_MEMFD if name else 0),
            userspace=side,
            guest_memfd=name,
        )

    async def convert(self, offset: int, size: int, *, private: bool) -> None:
        await self.client.set_memory_attributes(
            vm=self.vm, address=GPA + offset, size=size, attributes=8 if private else 0
        )

    async def run(
        self,
        *program: pb.Instruction,
        policy: pb.Policy.ValueType = pb.POLICY_NONE,
        answers: Sequence[int] = (),
        vcpu: int = 0,
    ) -> list[pb.RunResponse]:
        """Run to the end; exit number n is answered with `answers[n]`, or 0."""
        exits: list[pb.RunResponse] = []
        values = [*answers]
        run = self.client.run(vm=self.vm, program=program, policy=policy, vcpu=vcpu)
        async with run:
            async for reached in run.exits():
                exits.append(reached)
                if reached.WhichOneof("exit") == "hlt":
                    break
                await run.resume(values.pop(0) if values else 0)
        return exits


@asynccontextmanager
async def vmm_host(run_dir: Path) -> AsyncIterator[VmmHost]:
    async with (
        fake_guest_memfd(run_dir) as files,
        serve(start, run_dir, service="vmm", name="vmm-0") as runtime,
        VmmClient(runtime.target, client="test") as client,
    ):
        path = run_dir / "vmm-0.broker"
        broker = await asyncio.to_thread(BrokerClient, path, "test", "1")
        with broker:
            yield VmmHost(client, files, broker)


def results(exits: Sequence[pb.RunResponse]) -> list[pb.Result]:
    return [result for reached in exits for result in reached.results]
