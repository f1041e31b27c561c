"""One conversion by hand: `python first_conversion.py RUN_DIR`, with a host running.

RUN_DIR is the host's directory, where its sockets are: see TARGET of gmemctl status.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
from functools import partial
from multiprocessing.connection import Connection

from gmem.client import GuestMemfdClient, VmmClient
from gmem.memory import open_host_view
from gmem.uapi.errors import Contended
from gmem.uapi.flags import (
    KVM_GUEST_MEMFD_HUGE_SHIFT,
    KVM_GUEST_MEMFD_HUGETLB,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
)
from gmem.uapi.pages import PAGE_SIZE, SIZE_1G

GPA = 4 << 30
SIZE = 2 * SIZE_1G
FLAGS_1G = KVM_GUEST_MEMFD_HUGETLB | 30 << KVM_GUEST_MEMFD_HUGE_SHIFT


def device(pipe: Connection, token: str, broker: str, file: str) -> None:
    """Map the host view in a process of its own; write, drop and touch it when told."""
    window = open_host_view(token, broker, file=file)
    window.write(0, b"from the host")
    pipe.send("wrote to it")
    pipe.recv()
    window.dont_need()
    pipe.send("dropped it, MADV_DONTNEED")
    pipe.recv()
    pipe.send(f"read {window.array[0]}")


async def main(run_dir: str) -> None:
    """Make a VM with two 1G pages; make them private, then 4K of them shared."""
    vmm = VmmClient(f"unix:{run_dir}/vmm-0.sock")
    guest_memfd = GuestMemfdClient(f"unix:{run_dir}/guest_memfd.sock")
    async with vmm, guest_memfd:
        vm = (await vmm.create_vm(vm_id="first")).name
        file = await vmm.create_guest_memfd(vm=vm, size=SIZE, flags=FLAGS_1G)
        await vmm.set_user_memory_region2(
            vm=vm,
            slot=0,
            flags=KVM_MEM_GUEST_MEMFD,
            guest_phys_addr=GPA,
            memory_size=SIZE,
            guest_memfd=file,
        )
        print(f"{vm} has {file} at gpa {GPA:#x}")

        view = await guest_memfd.open_view(name=file)
        pipe, theirs = multiprocessing.Pipe()
        arguments = (theirs, view.token, view.broker_path, file)
        spawn = multiprocessing.get_context("spawn")
        child = spawn.Process(target=device, args=arguments)
        child.start()
        theirs.close()
        print(f"pid {child.pid} maps the host view, and {pipe.recv()}")

        convert = partial(vmm.set_memory_attributes, vm=vm, address=GPA)
        try:
            await convert(size=SIZE, attributes=KVM_MEMORY_ATTRIBUTE_PRIVATE)
        except Contended as refused:
            print(f"to private: {refused}")

        pipe.send("drop it")
        print(f"pid {child.pid} {pipe.recv()}")
        await convert(size=SIZE, attributes=KVM_MEMORY_ATTRIBUTE_PRIVATE)
        print("to private: done")

        pipe.send("touch it")
        child.join()
        print(f"pid {child.pid} touched it again: exit code {child.exitcode}")

        await convert(size=PAGE_SIZE, attributes=0)
        print("the first 4K to shared: done")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
