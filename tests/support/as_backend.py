"""What a client does to its descriptor, by the way that its host's backend offers.

With FUSE a system call on the descriptor reaches the service, and a private page is
SIGBUS. With memfds the same is asked by RPC, and a private page is zeros.
"""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING

from gmem.runtime.backend import Backend
from gmem.uapi.errors import KernelError
from gmem.uapi.flags import KVM_GMEM_CONVERT_PRIVATE, KVM_GMEM_CONVERT_SHARED
from tests.support.hosts import SIGBUS, Refused

if TYPE_CHECKING:
    from tests.support.hosts import Inode, Program


async def is_kept_out(client: Program, offset: int) -> bool:
    """Tell whether a plain load of a private page sees nothing: it may be deadly."""
    inode = _inode_of(client)
    if inode.host.backend is Backend.MEMFD:
        return bool(await client.asked("raw_load", offset) == 0)
    return await asyncio.to_thread(client.dies_of, "raw_load", offset) == SIGBUS


async def convert(
    client: Program, request: int, offset: int, size: int
) -> tuple[int, int]:
    """Convert by ioctl, or by RPC; return errno and error_offset."""
    inode = _inode_of(client)
    if inode.host.backend is Backend.FUSE:
        answer = await client.asked("convert", request, offset, size)
        assert (answer["offset"], answer["size"]) == (offset, size)
        return answer["errno"], answer["error_offset"]
    try:
        await inode.convert(offset, size, private=request == KVM_GMEM_CONVERT_PRIVATE)
    except KernelError as error:
        return error.errno or -1, int(error.numbers.get("error_offset", 0))
    return 0, 0


async def convert_often(
    client: Program, offset: int, size: int, times: int
) -> dict[str, int]:
    """Make pages private and shared again; count how often which errno came."""
    if _inode_of(client).host.backend is Backend.FUSE:
        counts: dict[str, int] = await client.asked(
            "convert_often", offset, size, times
        )
        return counts
    requests = (KVM_GMEM_CONVERT_PRIVATE, KVM_GMEM_CONVERT_SHARED) * times
    numbers = [(await convert(client, one, offset, size))[0] for one in requests]
    return {str(number): numbers.count(number) for number in numbers}


async def fallocate(client: Program, mode: int, offset: int, length: int) -> None:
    """Call fallocate on the descriptor, or the RPC; Refused with the errno's name."""
    inode = _inode_of(client)
    if inode.host.backend is Backend.FUSE:
        await client.asked("fallocate", mode, offset, length)
        return
    try:
        await inode.fallocate(mode, offset, length)
    except KernelError as error:
        raise Refused(errno.errorcode[error.errno or 0]) from error


def _inode_of(client: Program) -> Inode:
    assert client.inode is not None, "it was not made by mapped_by"
    return client.inode
