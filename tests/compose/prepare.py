"""Run in a client's container: an inode whose pages are shared, and a token for it.

Prints one JSON line. It runs a loop, so it maps nothing itself (design rule V1).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from gmem.client import GuestMemfdClient
from gmem.uapi.pages import SIZE_1G

TARGETS = dict(word.split("=") for word in os.environ["GMEM_TARGETS"].split())


async def main(size: int, name: str) -> None:
    async with GuestMemfdClient(TARGETS["guest_memfd"], client="prepare") as gmem:
        if not name:
            name = await new_inode(gmem, size)
        opened = await gmem.open_view(name=name)
    print(json.dumps({"name": name, "token": opened.token, "at": opened.broker_path}))


async def new_inode(gmem: GuestMemfdClient, size: int) -> str:
    vm = f"hosts/{os.environ['GMEM_HOST']}/vms/crash"
    made = await gmem.create_guest_memfd(size=size, page_size=SIZE_1G, vm=vm)
    await gmem.bind_memslot(
        name=made.name,
        vm=vm,
        slot=0,
        base_gfn=0,
        offset=0,
        size=size,
        host_faultable=True,
        vmm_target="",
    )
    return made.name


asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
