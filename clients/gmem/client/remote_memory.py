"""The shared pages of an inode for a client that maps nothing, on any machine."""

from __future__ import annotations

from contextlib import aclosing

from gmem.client.guest_memfd import Bytes, GuestMemfdClient


class RemoteMemory:
    """Reads and writes bytes of one inode through its service.

    Who has the pages mapped sees what is written here, and the other way round. A
    private page is NotFaultable (PAGE_NOT_FAULTABLE), as an access through a window of
    gmem.memory is.
    """

    def __init__(self, client: GuestMemfdClient, name: str) -> None:
        """Use `client` for the inode `name`; the client stays its maker's."""
        self._client = client
        self.name = name

    async def read(self, offset: int, size: int) -> bytes:
        """Return all bytes of a range, or none."""
        stream = self._client.read_range(name=self.name, offset=offset, size=size)
        async with aclosing(stream) as chunks:
            return b"".join([chunk async for chunk in chunks])

    async def write(self, offset: int, data: Bytes) -> None:
        """Write bytes; a refusal says in `stored` how many of them are written."""
        await self._client.write_range(name=self.name, offset=offset, data=data)
