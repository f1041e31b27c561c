"""Memslots: which guest frames a VM has, and what stands behind them.

`Region` is what KVM_SET_USER_MEMORY_REGION2 was asked for, `Memslot` what is in force.
`Memslots.plan` decides, changing nothing; checks come in the kernel's order
(__kvm_set_memory_region): flags, alignment, guest_memfd offset, slot and gpa, delete,
immutability, overlap. EEXIST means an overlap of guest addresses and nothing else.

A userspace side is `{descriptor, offset}`, the emulator's userspace_addr: what counts
for alignment is the offset, because a client maps a descriptor where it likes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Final

from gmem.uapi.errors import BadRequest, ObjectExists, Reason
from gmem.uapi.flags import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
)
from gmem.uapi.pages import PAGE_SHIFT, PAGE_SIZE, U64_LIMIT, PgRange

USER_MEM_SLOTS: Final = 32764
"""KVM_USER_MEM_SLOTS: slot ids are below it."""
PAGES_MAX: Final = (1 << 31) - 1
"""KVM_MEM_MAX_NR_PAGES: more a memslot cannot have."""


@dataclass(frozen=True, slots=True)
class Userspace:
    """A descriptor of the broker and the byte in it at which the slot begins."""

    descriptor: str
    offset: int


@dataclass(frozen=True, slots=True)
class Region:
    """struct kvm_userspace_memory_region2; sizes, addresses and offsets in bytes."""

    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace: Userspace | None = None
    guest_memfd: str = ""
    guest_memfd_offset: int = 0

    @property
    def gfns(self) -> PgRange:
        """The guest frames; only of a region that `require_valid` let pass."""
        return PgRange.of_bytes(self.guest_phys_addr, self.memory_size)

    @property
    def has_gmem(self) -> bool:
        """Whether KVM_MEM_GUEST_MEMFD is set."""
        return bool(self.flags & KVM_MEM_GUEST_MEMFD)


@dataclass(frozen=True, slots=True)
class Memslot:
    """A region in force, and the windows of the guest process that reach it.

    `gmem_only`: the guest's shared accesses come from the file as well, whatever the
    userspace side (KVM_MEMSLOT_GMEM_ONLY); `userspace_window` then shows the file's
    host view.
    """

    region: Region
    userspace_window: int | None
    guest_view_window: int | None
    gmem_only: bool = False

    @property
    def gfns(self) -> PgRange:
        """The guest frames."""
        return self.region.gfns

    @property
    def has_gmem(self) -> bool:
        """Whether a guest_memfd stands behind it (kvm_slot_can_be_private)."""
        return self.region.has_gmem

    @property
    def read_only(self) -> bool:
        """Whether a guest write is an MMIO exit."""
        return bool(self.region.flags & KVM_MEM_READONLY)

    @property
    def userspace_page(self) -> int:
        """The page number of userspace_addr; 0 where there is none."""
        side = self.region.userspace
        return side.offset >> PAGE_SHIFT if side else 0

    @property
    def file_page(self) -> int:
        """The page of the guest_memfd at which the slot begins (gmem.pgoff)."""
        return self.region.guest_memfd_offset >> PAGE_SHIFT

    def file_offset(self, gfn: int) -> int:
        """Translate a guest frame to the byte in the guest_memfd."""
        gfns = self.gfns
        assert gfn in gfns, (gfn, gfns)
        pages = gfn - gfns.start
        return (pages << PAGE_SHIFT) + self.region.guest_memfd_offset


class Change(Enum):
    """enum kvm_mr_change, and NONE where nothing would change."""

    CREATE = "create"
    DELETE = "delete"
    MOVE = "move"
    FLAGS_ONLY = "flags only"
    NONE = "none"


class Memslots:
    """The memslots of one VM, by slot id; their gfn ranges are disjoint."""

    def __init__(self) -> None:
        self._slots: dict[int, Memslot] = {}

    def __iter__(self) -> Iterator[Memslot]:
        """Iterate in the order of guest addresses."""
        return iter(sorted(self._slots.values(), key=lambda slot: slot.gfns.start))

    def __len__(self) -> int:
        """Return the number of memslots."""
        return len(self._slots)

    def get(self, slot: int) -> Memslot | None:
        """Return the memslot with an id (id_to_memslot)."""
        return self._slots.get(slot)

    def find(self, gfn: int) -> Memslot | None:
        """Return the memslot of a guest frame (gfn_to_memslot)."""
        address = gfn << PAGE_SHIFT
        for slot in self._slots.values():
            start = slot.region.guest_phys_addr
            if start <= address < start + slot.region.memory_size:
                return slot
        return None

    def with_gmem(self, gfns: PgRange) -> Iterator[tuple[Memslot, PgRange]]:
        """Iterate over slots with guest_memfd, and their part of `gfns`, ascending."""
        for slot in self:
            if slot.has_gmem and slot.gfns.overlaps(gfns):
                yield slot, slot.gfns.intersection(gfns)

    def plan(self, region: Region) -> Change:
        """Say what `region` would change; only of a region that is valid.

        Raises BadRequest (MEMSLOT_UNKNOWN, MEMSLOT_IMMUTABLE, RANGE_WRAPS) and
        ObjectExists (MEMSLOT_OVERLAP).
        """
        old = self._slots.get(region.slot)
        if region.memory_size == 0:
            self._require_old(region.slot, old)
            return Change.DELETE
        if region.memory_size >> PAGE_SHIFT > PAGES_MAX:
            raise BadRequest(
                Reason.RANGE_WRAPS,
                f"{region.memory_size:#x} bytes are more than the {PAGES_MAX} pages "
                "that a memslot can have: shorten it",
            )
        if old is None:
            self._require_free(region)
            return Change.CREATE
        change = _modification(old.region, region)
        if change is Change.MOVE:
            self._require_free(region)
        return change

    def put(self, slot: Memslot) -> None:
        """Set a memslot, new or in place of the one with its id."""
        self._slots[slot.region.slot] = slot
        self.check()

    def remove(self, slot: int) -> Memslot:
        """Take a memslot out; return it."""
        return self._slots.pop(slot)

    def check(self) -> None:
        """Assert that no guest frame is in two memslots."""
        slots = list(self)
        for low, high in pairwise(slots):
            assert low.gfns.stop <= high.gfns.start, (low, high)

    def _require_old(self, slot: int, old: Memslot | None) -> None:
        if old is None:
            raise BadRequest(
                Reason.MEMSLOT_UNKNOWN,
                f"memslot {slot} is not there: nothing to delete",
                slot=slot,
            )

    def _require_free(self, region: Region) -> None:
        for other in self:
            if other.region.slot != region.slot and other.gfns.overlaps(region.gfns):
                raise ObjectExists(
                    Reason.MEMSLOT_OVERLAP,
                    f"memslot {other.region.slot} has guest addresses of that range: "
                    "use another",
                    slot=other.region.slot,
                    gpa=other.region.guest_phys_addr,
                    size=other.region.memory_size,
                )


def require_valid(region: Region, *, has_gmem: bool) -> None:
    """Check what needs no other memslot: steps 1 to 4 of the kernel's order.

    Raises BadRequest: FLAG_UNKNOWN, FLAG_COMBINATION, RANGE_UNALIGNED, RANGE_WRAPS,
    ARGUMENT_INVALID.
    """
    _require_flags(region.flags, has_gmem=has_gmem)
    offset = region.userspace.offset if region.userspace else 0
    _require_aligned("size", region.memory_size)
    _require_aligned("gpa", region.guest_phys_addr)
    _require_aligned("userspace offset", offset)
    if region.has_gmem:
        _require_aligned("guest_memfd offset", region.guest_memfd_offset)
        _require_no_wrap(
            "guest_memfd offset", region.guest_memfd_offset, region.memory_size
        )
    if region.slot >= USER_MEM_SLOTS:
        raise BadRequest(
            Reason.ARGUMENT_INVALID,
            f"slot {region.slot} is no id below {USER_MEM_SLOTS}: use a smaller one",
            slot=region.slot,
        )
    _require_no_wrap("gpa", region.guest_phys_addr, region.memory_size)


def _require_flags(flags: int, *, has_gmem: bool) -> None:
    gmem = KVM_MEM_GUEST_MEMFD if has_gmem else 0
    unknown = flags & ~(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY | gmem)
    if unknown & KVM_MEM_GUEST_MEMFD:
        raise BadRequest(
            Reason.FLAG_UNKNOWN,
            "this VM has no private memory: use a SW_PROTECTED VM for guest_memfd",
            flags=unknown,
        )
    if unknown:
        raise BadRequest(
            Reason.FLAG_UNKNOWN,
            f"flag bits {unknown:#x} mean nothing: clear them",
            flags=unknown,
        )
    # Writes to a read-only slot are MMIO, not page faults; private memory cannot.
    for bit, name in (
        (KVM_MEM_LOG_DIRTY_PAGES, "LOG_DIRTY_PAGES"),
        (KVM_MEM_READONLY, "READONLY"),
    ):
        if flags & KVM_MEM_GUEST_MEMFD and flags & bit:
            raise BadRequest(
                Reason.FLAG_COMBINATION,
                f"GUEST_MEMFD does not go with {name}: drop one",
                flags=flags,
            )


def _require_aligned(what: str, value: int) -> None:
    if value % PAGE_SIZE:
        raise BadRequest(
            Reason.RANGE_UNALIGNED,
            f"{what} {value:#x} is no multiple of {PAGE_SIZE}: align it",
            value=value,
        )


def _require_no_wrap(what: str, start: int, size: int) -> None:
    if start + size >= U64_LIMIT:
        raise BadRequest(
            Reason.RANGE_WRAPS,
            f"{what} {start:#x} plus {size:#x} bytes wraps at 2^64: shorten it",
            value=start,
            size=size,
        )


def _modification(old: Region, new: Region) -> Change:
    if old.has_gmem or new.has_gmem:
        raise BadRequest(
            Reason.MEMSLOT_IMMUTABLE,
            f"memslot {new.slot} with guest_memfd cannot change: delete it first",
            slot=new.slot,
        )
    read_only = (old.flags ^ new.flags) & KVM_MEM_READONLY
    same_size = old.memory_size == new.memory_size
    if old.userspace != new.userspace or not same_size or read_only:
        raise BadRequest(
            Reason.MEMSLOT_IMMUTABLE,
            f"memslot {new.slot} keeps its size, userspace side and READONLY: "
            "delete it, set it again",
            slot=new.slot,
        )
    if old.guest_phys_addr != new.guest_phys_addr:
        return Change.MOVE
    return Change.NONE if old.flags == new.flags else Change.FLAGS_ONLY
