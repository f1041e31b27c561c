"""Ranges of memory as streams of chunks: nothing is held between two of them.

Each chunk is one operation of the core. A caller that goes away ends the stream after
the operation that it is in (V9), and the network is waited for between operations only:
a slow reader keeps one chunk of memory, and no lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Final, TypeVar

from gmem.api.guest_memfd.v1 import guest_memfd_pb2 as pb
from gmem.guest_memfd.core.inodes import ByteRange
from gmem.guest_memfd.service import GuestMemfdService
from gmem.uapi.errors import BadRequest, KernelError, Reason
from gmem.uapi.pages import cut

CHUNK_BYTES_MAX: Final = 1 << 20
"""Bytes in one message; a message of gRPC may have 4 MiB."""

T = TypeVar("T")


async def read(
    service: GuestMemfdService, target: ByteRange
) -> AsyncGenerator[pb.ReadRangeResponse]:
    """Yield the bytes of a range, chunk by chunk."""
    with service.mutex:
        service.core.check_bytes(target)
    for offset, size in cut(target.offset, target.size, CHUNK_BYTES_MAX):
        chunk = service.core.read(ByteRange(target.inode, offset, size))
        yield pb.ReadRangeResponse(data=await _whole(service.run_in_worker(chunk)))


async def write(
    service: GuestMemfdService,
    target: ByteRange,
    parts: AsyncIterator[pb.WriteRangeRequest],
) -> None:
    """Store what comes in a range; every KernelError tells how much is `stored`."""
    with service.mutex:
        service.core.check_bytes(target)
    stored = 0
    try:
        async for part in parts:
            data = _data_of(part, target.size - stored)
            chunk = service.core.write(target.inode, target.offset + stored, data)
            await _whole(service.run_in_worker(chunk))
            stored += len(data)
        _require_all(target, stored)
    except KernelError as error:
        error.numbers["stored"] = stored
        raise


async def _whole(operation: Awaitable[T]) -> T:
    """Await an operation; where the caller goes away, its end all the same."""
    task = asyncio.ensure_future(operation)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _data_of(part: pb.WriteRangeRequest, left: int) -> bytes:
    if part.WhichOneof("part") != "data" or not 0 < len(part.data) <= CHUNK_BYTES_MAX:
        raise BadRequest(
            Reason.ARGUMENT_INVALID,
            f"a message after the header has {len(part.data)} bytes of data: send 1 to "
            f"{CHUNK_BYTES_MAX}, and one header",
        )
    if len(part.data) > left:
        raise BadRequest(
            Reason.STREAM_LENGTH,
            f"{len(part.data)} bytes came where {left} were left of the size in the "
            "header: send as many as it says",
        )
    return part.data


def _require_all(target: ByteRange, stored: int) -> None:
    if stored < target.size:
        raise BadRequest(
            Reason.STREAM_LENGTH,
            f"the stream ended after {stored} of {target.size} bytes, which are "
            "stored: send as many as its header says",
        )
