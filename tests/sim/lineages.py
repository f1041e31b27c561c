"""What histories of each lineage do, and what their checkers demand: one row for each.

Written from the series, not read from the tables of the cores: a row that is wrong
there must not be wrong here as well.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gmem.uapi.flags import (
    GUEST_MEMFD_FLAG_HUGETLB,
    GUEST_MEMFD_FLAG_INIT_PRIVATE,
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    GUEST_MEMFD_FLAG_SUPPORT_SHARED,
    GUESTMEM_HUGE_SHIFT,
    KVM_GUEST_MEMFD_HUGE_SHIFT,
    RFC_V1_HUGE_PAGES,
    RFC_V2_HUGE_PAGES,
)
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, PAGE_SIZES, order_of

_SOMETIMES: Final = (
    "lost reply",
    "reply from memory",
    "loser of an allocation race",
    "guest access served",
    "a page lost",
    "a frame lost",
    "an error forgotten",
    "heard of a memory error",
    "a guest met a memory error",
)
_CONVERTING: Final = (
    *_SOMETIMES,
    "refused conversion",
    "rollback after a failed split",
    "reconstruct",
    "refused: POOL_EMPTY",
    "refused: VMEMMAP_RESTORE_FAILED",
    "a lost huge folio left its pool",
)


@dataclass(frozen=True, slots=True)
class Play:
    """How a lineage is played.

    `page_sizes`: what its files can have; `huge_flag` and `huge_shift` make the flag
    word of a huge one, or its order is said beside the flags (shift None). Each file
    has one of `file_flags`, one of 4K maybe one of `small_file_flags`. `in_place`: the
    file itself says which pages are shared, has ioctls that convert it, and is what the
    guest's shared accesses reach. `attributes2`: its ioctl is one for both ways, which
    does a huge page at a time and keeps what it did before a failure. `whole_folios`:
    fallocate takes such alone.
    `keeps_content`: the bytes of a page outlive a conversion. `rounds_out`: making a
    part of a folio private can make it whole. `bind_resets`: a bind overwrites what was
    shared and private. `sometimes`: what a campaign must have seen; without it, it
    proves nothing about it.
    """

    page_sizes: tuple[int, ...]
    huge_flag: int
    huge_shift: int | None
    file_flags: tuple[int, ...]
    in_place: bool
    keeps_content: bool
    rounds_out: bool
    bind_resets: bool
    sometimes: tuple[str, ...]
    small_file_flags: tuple[int, ...] = ()
    attributes2: bool = False
    whole_folios: bool = False

    def file_flags_of(self, page_size: int) -> tuple[int, ...]:
        """Return what the files with such pages have beside their size."""
        if page_size == PAGE_SIZE:
            return self.file_flags + self.small_file_flags
        return self.file_flags

    def creation(self, page_size: int, file_flags: int) -> tuple[int, int]:
        """Return flag word and page_order of KVM_CREATE_GUEST_MEMFD."""
        if page_size == PAGE_SIZE:
            return file_flags, 0
        flags = file_flags | self.huge_flag
        if self.huge_shift is None:
            return flags, order_of(page_size)
        return flags | (page_size.bit_length() - 1) << self.huge_shift, 0


PLAYS: Final[Mapping[Lineage, Play]] = {
    Lineage.RFC_V1: Play(
        page_sizes=PAGE_SIZES,
        huge_flag=RFC_V1_HUGE_PAGES,
        huge_shift=KVM_GUEST_MEMFD_HUGE_SHIFT,
        file_flags=(0,),
        in_place=False,
        keeps_content=False,
        rounds_out=False,
        bind_resets=True,
        sometimes=(*_CONVERTING, "evict after the last pin"),
    ),
    Lineage.RFC_V2: Play(
        page_sizes=PAGE_SIZES,
        huge_flag=RFC_V2_HUGE_PAGES,
        huge_shift=GUESTMEM_HUGE_SHIFT,
        file_flags=(
            GUEST_MEMFD_FLAG_SUPPORT_SHARED,
            GUEST_MEMFD_FLAG_SUPPORT_SHARED | GUEST_MEMFD_FLAG_INIT_PRIVATE,
        ),
        in_place=True,
        keeps_content=True,
        rounds_out=True,
        bind_resets=False,
        sometimes=(*_CONVERTING, "merge after the inode", "refused punch"),
    ),
    # Of a software-protected VM. A file that cannot be mapped has no host view that the
    # histories could open.
    Lineage.IN_PLACE: Play(
        page_sizes=PAGE_SIZES,
        huge_flag=GUEST_MEMFD_FLAG_HUGETLB,
        huge_shift=None,
        file_flags=(GUEST_MEMFD_FLAG_MMAP,),
        small_file_flags=(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED,),
        in_place=True,
        keeps_content=True,
        rounds_out=True,
        bind_resets=False,
        sometimes=(
            *_CONVERTING,
            "merge after the inode",
            "refused punch",
            "drained",
            "refused behind the first huge page",
        ),
        attributes2=True,
        whole_folios=True,
    ),
    # A software-protected VM, in which a file begins as private and stays so: what is
    # converted are the attributes alone, and the file serves both kinds of access.
    Lineage.MAINLINE: Play(
        page_sizes=(PAGE_SIZE,),
        huge_flag=0,
        huge_shift=0,
        file_flags=(GUEST_MEMFD_FLAG_MMAP,),
        in_place=False,
        keeps_content=True,
        rounds_out=True,
        bind_resets=False,
        sometimes=_SOMETIMES,
    ),
}
"""Every lineage that can be played; `lineage_of` deals seeds to them in turn."""


def played(word: str) -> Lineage:
    """Return the lineage of an option's word (usage error: no row)."""
    known = [str(lineage) for lineage in PLAYS]
    if word not in known:
        raise ArgumentTypeError(
            f"{word!r} is no lineage that is simulated: say one of {', '.join(known)}, "
            "or give it a row in tests/sim/lineages.py"
        )
    return Lineage(word)


def lineage_of(seed: int) -> Lineage:
    """Return the lineage of a seed, where nobody asks for one."""
    lineages = list(PLAYS)
    return lineages[seed % len(lineages)]
