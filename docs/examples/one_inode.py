"""The running example of docs/semantics.md: `python one_inode.py RUN_DIR`.

One inode of two 1G pages on a host whose pool has two; a line of state for each step.
"""

from __future__ import annotations

import asyncio
import sys

from gmem.api.guest_memfd.v1.guest_memfd_pb2 import GuestMemfd
from gmem.client import GuestMemfdClient, HostAllocatorClient, VmmClient
from gmem.client.program import halt, store, verify
from gmem.memory import open_host_view
from gmem.uapi.errors import KernelError
from gmem.uapi.flags import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    KVM_GUEST_MEMFD_HUGE_SHIFT,
    KVM_GUEST_MEMFD_HUGETLB,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
)
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G, format_size

GPA = 4 << 30
FLAGS_1G = KVM_GUEST_MEMFD_HUGETLB | 30 << KVM_GUEST_MEMFD_HUGE_SHIFT


def runs(gmem: GuestMemfd) -> str:
    """Write faultability as runs: `4K shared, 2097148K private`."""
    words = [
        (run.size, "shared" if run.shared else "private") for run in gmem.fragments
    ]
    return ", ".join(f"{format_size(size)} {word}" for size, word in words)


class Example:
    """The clients of one host, and the counters that a step has changed."""

    def __init__(self, run_dir: str) -> None:
        """Connect to the three services of a host."""
        self.allocator = HostAllocatorClient(f"unix:{run_dir}/host_allocator.sock")
        self.guest_memfd = GuestMemfdClient(f"unix:{run_dir}/guest_memfd.sock")
        self.vmm = VmmClient(f"unix:{run_dir}/vmm-0.sock")
        self.vm = self.gmem = ""

    async def state(self, step: str) -> None:
        """Print the counters of the 1G pool, and what the inode and stage 2 have."""
        host = await self.allocator.get_statistics()
        pool = next(pool for pool in host.pools if pool.page_size == SIZE_1G)
        free = sum(node.free_huge_pages for node in pool.nodes)
        line = f"free {free} resv {pool.resv_huge_pages}"
        line += f" vmemmap saved {host.vmemmap.saved_pages}"
        if self.gmem:
            inode = await self.guest_memfd.get_guest_memfd(self.gmem)
            stage2 = await self.vmm.get_stage2(self.vm)
            line += f" | whole {inode.whole_folios} split {inode.split_folios}"
            line += f" | {runs(inode)}"
            line += f" | stage 2 1G {stage2.entries_1g} 4K {stage2.entries_4k}"
        print(f"{step}\n    {line}")

    async def convert(self, offset: int, size: int, *, private: bool) -> str:
        """KVM_SET_MEMORY_ATTRIBUTES; return how it ended."""
        attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        try:
            await self.vmm.set_memory_attributes(
                vm=self.vm, address=GPA + offset, size=size, attributes=attributes
            )
        except KernelError as refused:
            return str(refused).split(" ", 1)[0]
        return "0"

    async def bind(self, memory_size: int) -> None:
        """KVM_SET_USER_MEMORY_REGION2 of slot 0; size 0 deletes it."""
        await self.vmm.set_user_memory_region2(
            vm=self.vm,
            slot=0,
            flags=KVM_MEM_GUEST_MEMFD if memory_size else 0,
            guest_phys_addr=GPA,
            memory_size=memory_size,
            guest_memfd=self.gmem if memory_size else "",
        )

    async def touch(self) -> asyncio.subprocess.Process:
        """Have another process map the host view, and write to its first page."""
        view = await self.guest_memfd.open_view(name=self.gmem)
        words = (sys.executable, __file__, "--toucher", view.token, view.broker_path)
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe)
        await _said(process)
        return process

    async def guest(self, offset: int) -> int:
        """Have the guest write one byte at `offset`, unless the page has one."""
        program = [verify(GPA + offset, 1, 7), store(GPA + offset, b"\7"), halt()]
        async with self.vmm.run(vm=self.vm, program=program) as run:
            return (await run.results())[0].count

    async def play(self) -> None:
        """Run through the example."""
        await self.state("the pool before")
        self.vm = (await self.vmm.create_vm(vm_id="one")).name
        await self.vmm.create_vcpu(vm=self.vm, vcpu=0)
        self.gmem = await self.vmm.create_guest_memfd(
            vm=self.vm, size=2 * SIZE_1G, flags=FLAGS_1G
        )
        await self.state("1 KVM_CREATE_GUEST_MEMFD of 2 GiB")
        await self.bind(2 * SIZE_1G)
        await self.state("2 KVM_SET_USER_MEMORY_REGION2 binds it (SW_PROTECTED)")
        toucher = await self.touch()
        await self.state("3 a process writes the first page of its mapping")
        ended = await self.convert(0, 2 * SIZE_1G, private=True)
        await self.state(f"4 all to private, while it is mapped: {ended}")
        await _told(toucher, b"drop\n")
        ended = await self.convert(0, 2 * SIZE_1G, private=True)
        await self.state(f"5 MADV_DONTNEED, then all to private: {ended}")
        await self.guest(SIZE_1G + PAGE_SIZE)
        await self.state("6 the guest writes a page of the second 1G page")
        ended = await self.convert(SIZE_1G, PAGE_SIZE, private=False)
        await self.state(f"7 the first 4K of the second 1G page to shared: {ended}")
        lost = await self.guest(SIZE_1G + PAGE_SIZE)
        await self.state(f"8 the guest looks at its page: {lost} byte differs")
        ended = await self.convert(SIZE_1G, PAGE_SIZE, private=True)
        await self.state(f"9 the 4K back to private: {ended}")
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        await self.guest_memfd.fallocate(
            name=self.gmem, mode=mode, offset=0, length=2 * SIZE_1G
        )
        await self.state("10 PUNCH_HOLE of everything")
        await toucher.communicate(b"")
        await self.bind(0)
        await self.vmm.delete_vm(name=self.vm)
        await self.guest_memfd.delete_guest_memfd(name=self.gmem)
        self.gmem = ""
        await self.state("11 memslot deleted, VM and file closed")


async def _said(process: asyncio.subprocess.Process) -> None:
    if process.stdout is None or not await process.stdout.readline():
        raise SystemExit(f"the other process ended with {await process.wait()}")


async def _told(process: asyncio.subprocess.Process, line: bytes) -> None:
    if process.stdin is not None:
        process.stdin.write(line)
    await _said(process)


def toucher(token: str, broker: str) -> None:
    """Be the other process: write, wait for a line, drop, wait for the end."""
    with open_host_view(token, broker, size=PAGE_SIZE) as window:
        window.write(0, b"from the host")
        print("wrote", flush=True)
        if sys.stdin.readline():
            window.dont_need()
            print("dropped", flush=True)
            sys.stdin.readline()


async def main(run_dir: str) -> None:
    """Play the example against one host."""
    example = Example(run_dir)
    async with example.allocator, example.guest_memfd, example.vmm:
        await example.play()


if __name__ == "__main__":
    if sys.argv[1] == "--toucher":
        toucher(*sys.argv[2:])
    else:
        asyncio.run(main(sys.argv[1]))
