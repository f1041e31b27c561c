"""The calls that convert: by ranges, waiting or not, and as the files' own ioctls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

from gmem.effects import Op
from gmem.guest_memfd.core.checks import (
    require_attributes_ioctl,
    require_convert_ioctl,
)
from gmem.guest_memfd.core.conversion import ConvertItem, require_disjoint
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.inodes import ByteRange, Inodes
from gmem.guest_memfd.core.lineage import Operation
from gmem.guest_memfd.core.operations import locked
from gmem.guest_memfd.core.references import References
from gmem.guest_memfd.core.values import AttributesCall
from gmem.guest_memfd.core.waiting import until_released
from gmem.uapi.errors import Reason, Unsupported
from gmem.uapi.flags import (
    KVM_GMEM_CONVERT_PRIVATE,
    KVM_GMEM_CONVERT_SHARED,
    KVM_SET_MEMORY_ATTRIBUTES2,
    Faultability,
)

CONVERT_IOCTL_OF: Final = {
    Faultability.ALL: KVM_GMEM_CONVERT_SHARED,
    Faultability.GUEST: KVM_GMEM_CONVERT_PRIVATE,
}


class ConvertCalls(Inodes):
    """What can be called to change who may fault; part of `GuestMemfdCore`."""

    def convert(
        self,
        ranges: Sequence[ByteRange],
        to: Faultability,
        *,
        validate_only: bool,
        wait_ms: int | None = None,
    ) -> Op[None]:
        """Convert ranges, one after the other; roll all of them back on failure.

        Contended (PAGE_IN_USE) with error_offset, inode, holders and count. With
        `wait_ms` it waits for the holders instead, and gives up with Contended
        (DEADLINE), having changed nothing.
        """
        if wait_ms is None:
            yield from self._attempt(ranges, to, validate_only=validate_only)
            return
        attempt = partial(
            self._attempt, ranges, to, validate_only=validate_only, waits=True
        )
        yield from until_released(attempt, partial(self._held, ranges), wait_ms)

    def _held(self, ranges: Sequence[ByteRange]) -> dict[int, References]:
        return {part.inode: self.inode(part.inode).references for part in ranges}

    def _attempt(
        self,
        ranges: Sequence[ByteRange],
        to: Faultability,
        *,
        validate_only: bool,
        waits: bool = False,
    ) -> Op[None]:
        items = [ConvertItem(*self._pages_of(target)) for target in ranges]
        require_disjoint(items)
        yield from self._convert(items, to, validate_only=validate_only, waits=waits)

    def convert_ioctl(
        self,
        number: int,
        to: Faultability,
        *,
        offset: int,
        size: int,
        error_offset: int,
    ) -> Op[None]:
        """KVM_GMEM_CONVERT_SHARED and _PRIVATE; Unsupported (IOCTL_UNKNOWN) elsewhere.

        Refusals as `convert`.
        """
        inode = self._with_ioctl(number, CONVERT_IOCTL_OF[to])
        pages = require_convert_ioctl(offset, size, error_offset, i_size=inode.i_size)
        if pages is not None:
            items = [ConvertItem(inode, pages)]
            yield from self._convert(items, to, validate_only=False)

    def attributes_ioctl(self, number: int, call: AttributesCall) -> Op[None]:
        """KVM_SET_MEMORY_ATTRIBUTES2; Unsupported (IOCTL_UNKNOWN) elsewhere.

        Refusals as `convert`.
        """
        inode = self._with_ioctl(number, KVM_SET_MEMORY_ATTRIBUTES2)
        private_memory = inode.options.private_memory
        pages = require_attributes_ioctl(
            call, i_size=inode.i_size, private_memory=private_memory
        )
        items = [ConvertItem(inode, pages)]
        yield from self._convert(items, call.to, validate_only=False)

    def _with_ioctl(self, number: int, request: int) -> Inode:
        inode = self.inode(number)
        if request not in inode.rules.convert_ioctls:
            raise Unsupported(
                Reason.IOCTL_UNKNOWN,
                f"a file of {inode.options.lineage} has no ioctl {request:#x} on this "
                "host: see docs/kernel-calls.md for what converts it",
                inode=number,
            )
        return inode

    def _convert(
        self,
        items: list[ConvertItem],
        to: Faultability,
        *,
        validate_only: bool,
        waits: bool = False,
    ) -> Op[None]:
        by_number = {item.inode.number: item.inode for item in items}
        inodes = [by_number[number] for number in sorted(by_number)]
        policy = inodes[0].rules.convert
        body = policy(items, to, validate_only=validate_only, waits=waits)
        yield from self._using(inodes, locked(inodes, Operation.CONVERT, body))
