"""The calls that move bytes: what ReadRange and WriteRange do with each chunk."""

from __future__ import annotations

from gmem.effects import Op
from gmem.guest_memfd.core.byte_access import read_bytes, require_shared, write_bytes
from gmem.guest_memfd.core.checks import require_bytes
from gmem.guest_memfd.core.inodes import ByteRange, Inodes
from gmem.guest_memfd.core.lineage import Operation
from gmem.guest_memfd.core.operations import guarded


class ByteCalls(Inodes):
    """What can be called to read and write memory; part of `GuestMemfdCore`."""

    def check_bytes(self, target: ByteRange) -> None:
        """Check that all of a range can be read and written at this moment.

        NoSuchObject (FD_UNKNOWN), BadRequest, NotFaultable (PAGE_NOT_FAULTABLE).
        """
        inode = self.open_file(target.inode)
        pages = require_bytes(target.offset, target.size, i_size=inode.i_size)
        require_shared(inode, pages)

    def read(self, target: ByteRange) -> Op[bytes]:
        """Return bytes of shared pages, aligned or not; refusals as `check_bytes`.

        Exhausted where a hole gets no folio.
        """
        inode = self.open_file(target.inode)
        require_bytes(target.offset, target.size, i_size=inode.i_size)
        body = read_bytes(inode, target.offset, target.size)
        return (yield from self._using([inode], guarded(inode, Operation.READ, body)))

    def write(self, number: int, offset: int, data: bytes) -> Op[None]:
        """Store bytes in shared pages, aligned or not, all of them or none.

        Refusals as `read`; Contended (PAGE_IN_USE) where programs touch the pages
        faster than they can be withdrawn.
        """
        inode = self.open_file(number)
        require_bytes(offset, len(data), i_size=inode.i_size)
        body = write_bytes(inode, offset, data)
        yield from self._using([inode], guarded(inode, Operation.WRITE, body))
