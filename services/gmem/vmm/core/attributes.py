"""What userspace asked for each guest frame: kvm->mem_attr_array, as runs.

Every frame is shared until KVM_SET_MEMORY_ATTRIBUTES says otherwise. This is one half
of the truth in RFC_V1; the other is the faultability of the inode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gmem.uapi.errors import BadRequest, Reason
from gmem.uapi.flags import MemoryAttribute
from gmem.uapi.pages import PAGE_SIZE, U64_LIMIT, PgRange
from gmem.vmm.core.runs import RunMap


class MemoryAttributes:
    """The attributes of one VM's guest frames."""

    def __init__(self) -> None:
        self._runs: RunMap[MemoryAttribute] = RunMap(
            MemoryAttribute.SHARED, tracked=True
        )

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self._runs)

    def is_private(self, gfn: int) -> bool:
        """Tell whether `gfn` is private (kvm_mem_is_private)."""
        return bool(self._runs.get(gfn) & MemoryAttribute.PRIVATE)

    def runs(self, gfns: PgRange) -> Iterator[tuple[PgRange, MemoryAttribute]]:
        """Iterate over the runs of `gfns` in ascending order."""
        return self._runs.runs(gfns)

    def have(self, gfns: PgRange, attributes: MemoryAttribute) -> bool:
        """Tell whether all of `gfns` have them (kvm_range_has_memory_attributes)."""
        return self._runs.is_uniform(gfns, attributes)

    def are_mixed(self, gfns: PgRange) -> bool:
        """Tell whether `gfns` differ among themselves (hugepage_test_mixed)."""
        return not self.have(gfns, self._runs.get(gfns.start))

    def store(self, gfns: PgRange, attributes: MemoryAttribute) -> None:
        """Give all of `gfns` the attributes."""
        self._runs.set(gfns, attributes)
        assert self.have(gfns, attributes)

    def drain(self) -> dict[int, MemoryAttribute | None]:
        """Return where runs changed since the last call: their starts and values."""
        return self._runs.drain()

    def reset(self, values: Mapping[int, MemoryAttribute]) -> None:
        """Have the runs that `drain` told of."""
        self._runs.reset(values)


def require_gpa_range(address: int, size: int) -> PgRange:
    """Return the frames of a gpa range, checked as the ioctl does.

    Raises BadRequest: RANGE_EMPTY, RANGE_WRAPS, RANGE_UNALIGNED.
    """
    if size == 0:
        raise BadRequest(
            Reason.RANGE_EMPTY, "size is 0: give at least one page", gpa=address
        )
    if address + size >= U64_LIMIT:
        raise BadRequest(
            Reason.RANGE_WRAPS,
            f"gpa {address:#x} plus {size:#x} bytes wraps at 2^64: shorten it",
            gpa=address,
        )
    if address % PAGE_SIZE or size % PAGE_SIZE:
        raise BadRequest(
            Reason.RANGE_UNALIGNED,
            f"gpa {address:#x} and size {size:#x} must be multiples of {PAGE_SIZE}",
            gpa=address,
        )
    return PgRange.of_bytes(address, size)
