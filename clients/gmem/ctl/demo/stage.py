"""What the steps of the demo share: the host, its clients, the VM, the programs."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from gmem.api.guest_memfd.v1.guest_memfd_pb2 import OpenViewResponse
from gmem.api.vmm.v1 import vmm_pb2 as pb
from gmem.client import GuestMemfdClient, HostAllocatorClient, VmmClient
from gmem.client.program import halt
from gmem.ctl.demo.children import Child, Program
from gmem.ctl.demo.containers import Containers
from gmem.ctl.demo.dialect import DIALECTS, Dialect
from gmem.ctl.demo.report import Snapshot
from gmem.ctl.directories import HostDirectory
from gmem.ctl.errors import ControlError
from gmem.ctl.processes import child_environment
from gmem.ctl.state import HostState
from gmem.runtime.backend import Backend
from gmem.runtime.broker_client import BrokerClient
from gmem.uapi.errors import Errno, KernelError
from gmem.uapi.flags import (
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
)
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, SIZE_1G

CLIENT: Final = "gmem-demo"
GPA: Final = 4 << 30
"""Where the guest sees its memory."""
MEMORY_SIZE: Final = 4 * SIZE_1G
BOUNCE_OFFSET: Final = 2 * SIZE_1G
"""In another 1G page than the payload: a split there re-zeroes its neighbours."""
BOUNCE_SIZE: Final = 64 << 20
VMEMMAP_PAGES: Final = 4095
"""What HVO saves for one 1G page, and a split takes back."""


class StepFailedError(Exception):
    """A step cannot go on: something it stands on is not so."""


@dataclass(frozen=True, slots=True)
class Payload:
    """A file that the guest is given."""

    path: Path
    size: int
    sha256: str

    @classmethod
    def read(cls, path: Path) -> Payload:
        """Look at a file. Raises ControlError where it cannot be a payload."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ControlError(
                f"payload {path} cannot be read ({error.strerror}): give another file"
            ) from error
        if not 0 < len(data) <= SIZE_1G:
            raise ControlError(
                f"payload {path} has {len(data)} bytes: give a file of 1 byte to 1 GiB"
            )
        return cls(path.resolve(), len(data), hashlib.sha256(data).hexdigest())

    @property
    def mapped_size(self) -> int:
        """Its size in whole pages."""
        return -(-self.size // PAGE_SIZE) * PAGE_SIZE


@dataclass(slots=True)
class Stage:
    """The running host; fields below the clients are filled by the steps."""

    directory: HostDirectory
    state: HostState
    payload: Payload
    allocator: HostAllocatorClient = field(init=False)
    guest_memfd: GuestMemfdClient = field(init=False)
    vmm: VmmClient = field(init=False)
    baseline: Snapshot | None = None
    vm: str = ""
    inode: str = ""
    memslot_memory: BrokerClient | None = None
    """Our connection to the vmm's broker: the memslot's userspace side ends with it."""
    lineage: Lineage = Lineage.RFC_V1
    backend: Backend = Backend.FUSE
    """What the host serves views with, as it says itself."""
    containers: Containers | None = None
    """Where the programs run as containers; None: as children of this process."""
    children: dict[str, Program] = field(default_factory=dict)
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def __aenter__(self) -> Self:
        """Connect to the three services."""
        enter = self._stack.enter_async_context
        self.allocator = await enter(
            HostAllocatorClient(self._target("host_allocator"), client=CLIENT)
        )
        self.guest_memfd = await enter(
            GuestMemfdClient(self._target("guest_memfd"), client=CLIENT)
        )
        self.vmm = await enter(VmmClient(self._target("vmm-0"), client=CLIENT))
        capabilities = await self.guest_memfd.get_capabilities()
        self.backend = Backend(capabilities.data_plane)
        if self.containers is not None:
            await enter(self.containers)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the programs, give up the descriptors, disconnect."""
        await self.end_children()
        self.release_memslot_memory()
        await self._stack.aclose()

    async def snapshot(self) -> Snapshot:
        """Take all counters, when what programs have touched is counted."""
        if self.inode:
            await self.guest_memfd.list_guest_memfds()
        statistics = await self.allocator.get_statistics()
        stage2 = await self.vmm.get_stage2(self.vm) if self.vm else None
        return Snapshot.of(statistics, stage2)

    async def child(self, name: str) -> Program:
        """Start a demo program, or return the one of the name that runs."""
        if name not in self.children:
            self.children[name] = await self._new_child(name)
        return self.children[name]

    async def end_child(self, name: str) -> int | None:
        """End one program; return its exit status."""
        return await self.children.pop(name).end()

    async def end_children(self) -> None:
        """End all programs at once."""
        children = list(self.children.values())
        self.children.clear()
        await asyncio.gather(*(child.end() for child in children))

    async def host_view(self) -> OpenViewResponse:
        """Mint a token for the host view of the VM's memory."""
        return await self.guest_memfd.open_view(name=self.inode)

    async def give_host_view_to_vmm(self) -> str:
        """Hand the host view to the vmm's broker, as a memslot's userspace side."""
        opened = await self.host_view()
        broker = (await self.vmm.get_capabilities()).broker_path
        # The fd of a view may block in any system call: never on the loop.
        return await asyncio.to_thread(self._give, opened, Path(broker))

    def release_memslot_memory(self) -> None:
        """Give up the memslot's userspace side."""
        if self.memslot_memory is not None:
            self.memslot_memory.close()
            self.memslot_memory = None

    async def convert(self, offset: int, size: int, *, private: bool) -> None:
        """Make a range of the VM's memory private or shared, as the lineage does it."""
        await self.dialect.convert(self, offset, size, private)

    @property
    def dialect(self) -> Dialect:
        """How the VMM speaks to its kernel."""
        return DIALECTS[self.lineage]

    @property
    def gpa(self) -> int:
        """Where the guest sees the first byte of the file."""
        return GPA

    async def refused_convert(
        self, offset: int, size: int, *, private: bool
    ) -> KernelError | None:
        """Convert, and return the refusal; None when it was carried out."""
        try:
            await self.convert(offset, size, private=private)
        except KernelError as error:
            return error
        return None

    async def run(self, *program: pb.Instruction) -> list[pb.Result]:
        """Run a guest program to its HLT, playing the VMM: KVM_RUN in a loop.

        MAP_GPA_RANGE is answered by a conversion. Raises StepFailedError for a
        memory fault, which none of the programs here means to have.
        """
        results: list[pb.Result] = []
        async with self.vmm.run(
            vm=self.vm, program=[*program, halt()], policy=pb.POLICY_NONE
        ) as run:
            async for left in run.exits():
                results += left.results
                match left.WhichOneof("exit"):
                    case "hypercall":
                        await run.resume(await self._hypercall(left.hypercall))
                    case "hlt":
                        return results
                    case other:
                        text = " ".join(str(left).split())
                        raise StepFailedError(f"unexpected exit {other}: {text}")
        raise StepFailedError("the vCPU left without HLT")

    async def run_one(self, instruction: pb.Instruction) -> pb.Result:
        """Run one instruction; return what it left."""
        results = await self.run(instruction)
        if len(results) != 1:
            raise StepFailedError(f"{len(results)} results of one instruction")
        return results[0]

    async def _hypercall(self, call: pb.HypercallExit) -> int:
        """Do what a VMM does for KVM_HC_MAP_GPA_RANGE; return what the guest gets."""
        if call.nr != KVM_HC_MAP_GPA_RANGE:
            raise StepFailedError(f"unexpected hypercall {call.nr}")
        gpa, npages, attributes = _three(call.args)
        private = bool(attributes & KVM_MAP_GPA_RANGE_ENCRYPTED)
        refused = await self.refused_convert(
            gpa - GPA, npages << PAGE_SHIFT, private=private
        )
        return 0 if refused is None else -(refused.errno or Errno.EINVAL) % (1 << 64)

    async def _new_child(self, name: str) -> Program:
        if self.containers is not None:
            return await self.containers.connect(name)
        environ = child_environment(os.environ, self.state.tag)
        return await Child.start(name, environ, self.directory.log(f"demo-{name}"))

    def _give(self, opened: OpenViewResponse, vmm_broker: Path) -> str:
        incarnation = secrets.token_hex(8)
        with BrokerClient(Path(opened.broker_path), CLIENT, incarnation) as broker:
            fd = broker.take(opened.token)
        try:
            self.memslot_memory = BrokerClient(vmm_broker, CLIENT, incarnation)
            return self.memslot_memory.give(fd, "memslot 0")
        finally:
            os.close(fd)

    def _target(self, name: str) -> str:
        return self.state.service(name).target


def _three(args: Sequence[int]) -> tuple[int, int, int]:
    if len(args) != 3:
        raise StepFailedError(f"MAP_GPA_RANGE with {len(args)} arguments")
    first, second, third = args
    return first, second, third
