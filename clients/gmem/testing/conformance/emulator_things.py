"""What an emulated host gives a case beside VMs and files."""

from __future__ import annotations

import asyncio
from typing import Final

from gmem.api.guest_memfd.v1 import guest_memfd_pb2
from gmem.client import HostAllocatorClient as AsyncAllocatorClient
from gmem.client import hugetlb_file
from gmem.client.sync import GuestMemfdClient, HostAllocatorClient
from gmem.testing.conformance.kvm import Hold, HugetlbFile, MemoryFailure
from gmem.testing.conformance.outcomes import errno_name
from gmem.uapi.errors import KernelError, Reason

CLIENT: Final = "conformance"


class EmulatedFailure(MemoryFailure):
    """A frame that the host takes for broken."""

    def __init__(
        self,
        files: GuestMemfdClient,
        allocator: HostAllocatorClient,
        file: str,
        offset: int,
        found: guest_memfd_pb2.InjectMemoryErrorResponse,
    ) -> None:
        """Take over what the service answered."""
        self.result = errno_name(found.errno)
        self.named = "named alone" if found.signalled else "nobody"
        self._files, self._allocator = files, allocator
        self._file, self._offset = file, offset
        self._pfn = found.pfn
        self._open = True

    def unpoison(self) -> None:
        """UnpoisonMemory of the page, or of its frame where the file has it no more."""
        try:
            self._files.unpoison_memory(name=self._file, offset=self._offset)
        except KernelError as error:
            if error.reason is not Reason.FRAME_UNKNOWN:
                raise
            self._allocator.unpoison_memory(self._pfn)
        self._open = False

    def close(self) -> None:
        """Forget the error."""
        if self._open:
            self.unpoison()


class EmulatedHold(Hold):
    """A hold that the service keeps."""

    def __init__(self, files: GuestMemfdClient, number: int) -> None:
        """Take over hold `number`."""
        self._files = files
        self._number: int | None = number

    def close(self) -> None:
        """UnpinPages."""
        number, self._number = self._number, None
        if number is not None:
            self._files.unpin_pages(hold=number)


class EmulatedHugetlbFile(HugetlbFile):
    """gmem.client's HugetlbFile, blocking."""

    def __init__(self, target: str, page_size: int) -> None:
        """memfd_create(MFD_HUGETLB)."""
        self._runner = asyncio.Runner()
        self._closed = False
        self._client = self._runner.run(self._connected(target))
        create = hugetlb_file.HugetlbFile.create(self._client, page_size=page_size)
        self._file = self._runner.run(create)

    def mmap(self) -> None:
        """Map it."""
        self._runner.run(self._file.mmap())

    def touch(self) -> None:
        """Write to it."""
        self._runner.run(self._file.touch())

    def munmap(self) -> None:
        """Unmap it."""
        self._file.munmap()

    def madvise(self, advice: int) -> None:
        """Call madvise where it was mapped."""
        self._file.madvise(advice)

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        self._runner.run(self._file.close())
        self._runner.run(self._client.close())
        self._runner.close()

    async def _connected(self, target: str) -> AsyncAllocatorClient:
        return AsyncAllocatorClient(target, client=CLIENT)
