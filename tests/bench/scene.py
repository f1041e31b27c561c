"""What rows are measured on: a running host, its clients, a worker, VMs with memory."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from gmem.client import GuestMemfdClient, VmmClient
from gmem.runtime.config import HostShape, NodeShape
from gmem.uapi.errors import KernelError, Reason
from gmem.uapi.flags import (
    GUEST_MEMFD_FLAG_INIT_PRIVATE,
    GUEST_MEMFD_FLAG_SUPPORT_SHARED,
    GUESTMEM_HUGE_SHIFT,
    KVM_MEM_GUEST_MEMFD,
    RFC_V2_HUGE_PAGES,
)
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import SIZE_1G, SIZE_2M
from tests.bench.children import WorkerProcess
from tests.support.hosts import Host

GPA: Final = 4 * SIZE_1G
TMPFS: Final = "/dev/shm"
"""Where journals are, as in the containers: a sync of another disk is not ours."""
VMMS: Final = 1
SMALL: Final = HostShape(
    nodes=(NodeShape(memory_size=8 * SIZE_1G, huge_pages={SIZE_1G: 4, SIZE_2M: 512}),)
)
"""The host of most rows."""
LARGE: Final = HostShape(
    nodes=(NodeShape(memory_size=1048 * SIZE_1G, huge_pages={SIZE_1G: 1024}),)
)
"""A host with 1 TiB in 1G pages, and base memory for the vmemmap of all, split."""

_numbers = itertools.count(1)


class SkippedError(Exception):
    """A row cannot be measured here; its text says what is missing."""


@dataclass(frozen=True, slots=True)
class Memory:
    """One inode bound to a VM; the worker has it mapped under `inode`'s name."""

    vm: str
    inode: str
    size: int


@dataclass
class Scene:
    """A running host with clients to it, and the worker."""

    host: Host
    gmem: GuestMemfdClient
    vmm: VmmClient
    worker: WorkerProcess
    notes: list[str] = field(default_factory=list)

    def begin_round(self) -> None:
        """Give the watchdog its whole bound again."""
        self.host.rearm()

    @asynccontextmanager
    async def memory(
        self,
        *,
        size: int = SIZE_1G,
        page_size: int = SIZE_1G,
        shared: bool = True,
        mapped: bool = True,
    ) -> AsyncIterator[Memory]:
        """Boot a VM of RFC_V2 with memory that is shared, or private, at first."""
        flags = GUEST_MEMFD_FLAG_SUPPORT_SHARED | RFC_V2_HUGE_PAGES
        flags |= (page_size.bit_length() - 1) << GUESTMEM_HUGE_SHIFT
        flags |= 0 if shared else GUEST_MEMFD_FLAG_INIT_PRIVATE
        vm = await self._create_vm()
        try:
            inode = await self.vmm.create_guest_memfd(vm=vm, size=size, flags=flags)
            try:
                await self.vmm.set_user_memory_region2(
                    vm=vm,
                    slot=0,
                    guest_phys_addr=GPA,
                    memory_size=size,
                    flags=KVM_MEM_GUEST_MEMFD,
                    guest_memfd=inode,
                )
                if mapped:
                    await self.map(inode, size)
                yield Memory(vm, inode, size)
            finally:
                if mapped:
                    await self.worker("close", inode)
                await self.gmem.delete_guest_memfd(name=inode)
        finally:
            await self.vmm.delete_vm(name=vm)

    async def map(self, inode: str, size: int) -> None:
        """Have the worker map the host view of an inode, under its name."""
        opened = await self.gmem.open_view(name=inode)
        await self.worker("take", inode, opened.token, size)

    async def _create_vm(self) -> str:
        try:
            vm = await self.vmm.create_vm(
                vm_id=f"bench-{next(_numbers)}", lineage=Lineage.RFC_V2
            )
        except KernelError as error:
            if error.reason is Reason.ARGUMENT_INVALID:
                raise SkippedError("needs RFC_V2") from error
            raise
        return vm.name


@asynccontextmanager
async def scene_of(host: Host, worker: WorkerProcess) -> AsyncIterator[Scene]:
    """Connect to a host, the worker as well."""
    async with (
        host.clients("bench") as (_, gmem),
        VmmClient(host.target("vmm-0"), client="bench") as vmm,
    ):
        broker = (await gmem.get_capabilities()).broker_path
        await worker("hello", broker)
        try:
            yield Scene(host, gmem, vmm, worker)
        finally:
            await worker("goodbye")
