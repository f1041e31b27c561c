"""What the series disagree on, and where the cores differ from them on purpose.

The model is written from docs/semantics.md and the series behind it. It shares no code
with the cores: not even a number of a flag.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

PAGE: Final = 4096
SIZE_2M: Final = 1 << 21
SIZE_1G: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Rules:
    """How one series does what all of them do.

    `vm_converts`: KVM_SET_MEMORY_ATTRIBUTES converts the files of the range.
    `file_decides`: a file that can share pages is converted by an ioctl of its own and
    says itself what is private. With neither, attributes alone change.
    `bind_shares`: a bind of a software-protected VM makes its range shared.
    `keeps_content`: bytes outlive a conversion; otherwise pages are zeroed.
    `rounds_out`: what becomes private makes each huge page whole that it touches.
    `busy`: the errno where pages are in use; `counts_references`: every reference is a
    use, not only a mapping or a pin, and mappings are taken away first.
    `punch_merges_first`: a huge page with a reference cannot be punched (EAGAIN), and
    `punch_is_whole`: nor can any that the same call would have punched.
    `holds_keep_inode`: a page in somebody's hands keeps its file's memory reserved.
    `counts_base_pages`: st_blocks counts pages of 4K too, not only huge ones.
    `huge_flag`, `size_shift`, `other_flags`: the flag word of KVM_CREATE_GUEST_MEMFD;
    `shares_with`: the flag without which no page can be shared, `private_with`: the one
    (only beside it) with which a file begins as private where it `begins_shared`.
    `shared_with`: the flag with which a file of 4K begins shared. `order_field`: the
    size of huge pages is their order, in a field of its own.
    `every_file_decides`: also one whose pages cannot be shared in place; VMs have no
    attributes. `attributes2`: the ioctl of files is one for both ways, by huge pages.
    `side_is_file`: what userspace maps at a memslot must be the file, where it can be.
    `whole_folios`: fallocate takes whole huge pages alone.
    `never`: calls that cannot come to anything. Defaults are what all series after the
    first have.
    """

    vm_converts: bool
    file_decides: bool
    punch_merges_first: bool
    counts_base_pages: bool
    huge_flag: int
    size_shift: int
    bind_shares: bool = False
    keeps_content: bool = True
    rounds_out: bool = True
    busy: int = errno.EAGAIN
    counts_references: bool = True
    holds_keep_inode: bool = False
    size_mask: int = 0x3F
    page_sizes: tuple[int, ...] = (PAGE, SIZE_2M, SIZE_1G)
    begins_shared: bool = False
    never: tuple[str, ...] = ()
    rounds_size_up: bool = False
    shares_with: int = 0
    private_with: int = 0
    shared_with: int = 0
    order_field: bool = False
    every_file_decides: bool = False
    attributes2: bool = False
    side_is_file: bool = False
    whole_folios: bool = False
    punch_is_whole: bool = False


RULES: Final[Mapping[str, Rules]] = {
    "RFC_V1": Rules(
        vm_converts=True,
        file_decides=False,
        bind_shares=True,
        keeps_content=False,
        rounds_out=False,
        busy=errno.EINVAL,
        counts_references=False,
        punch_merges_first=False,
        holds_keep_inode=True,
        counts_base_pages=True,
        huge_flag=1 << 1,
        size_shift=26,
        rounds_size_up=True,
        never=("convert_file", "set_attributes2"),
    ),
    "RFC_V2": Rules(
        vm_converts=False,
        file_decides=True,
        punch_merges_first=True,
        counts_base_pages=False,
        huge_flag=1 << 2,
        size_shift=58,
        shares_with=1 << 0,
        private_with=1 << 1,
        begins_shared=True,
        side_is_file=True,
        never=("set_attributes2",),
    ),
    # Version 8 of the in-place conversion, and the branch of it that has huge pages.
    "IN_PLACE": Rules(
        vm_converts=False,
        file_decides=True,
        punch_merges_first=True,
        counts_base_pages=True,
        huge_flag=1 << 2,
        size_shift=0,
        size_mask=0,
        shares_with=1 << 0,
        shared_with=1 << 1,
        order_field=True,
        every_file_decides=True,
        attributes2=True,
        whole_folios=True,
        punch_is_whole=True,
        never=("convert_file",),
    ),
    # Of a software-protected VM: INIT_SHARED (1 << 1) is not for it.
    "MAINLINE": Rules(
        vm_converts=False,
        file_decides=False,
        punch_merges_first=False,
        counts_base_pages=False,
        huge_flag=0,
        size_shift=26,
        size_mask=0,
        page_sizes=(PAGE,),
        shares_with=1 << 0,
        never=("unpin", "convert_file", "set_attributes2"),
    ),
}
"""Section 9 of the semantics, one row for each series."""


DEVIATIONS: Final[Mapping[int, str]] = {
    13: "a guest's shared accesses make no host mapping that refuses a conversion",
    16: "a plain reference does not stop a reconstruction (RFC_V1)",
    18: "the mapping of a memslot keeps the memory of a closed file",
    20: "making a partly shared range shared unmaps its shared pages",
    36: "a size bit pattern of 0 means 2M",
    37: "a page is filled for itself, not its whole folio",
    38: "a punch inside a huge page zeroes exactly its range",
    41: "a size that is rounded up is the size of the file",
    46: "error_offset of a conversion without memory stays 0",
    55: "a conversion that finds every page converted does nothing (RFC_V1)",
    71: "the flag HUGETLB is 1 << 2, and an order is a field of its own (IN_PLACE)",
    72: "no reference is held for a moment only: a drain finds none (IN_PLACE)",
    73: "huge pages that have the attributes are skipped one by one (IN_PLACE)",
    74: "no memory is short for the attributes of a file (IN_PLACE)",
    100: "a guest cannot reach a page that a refused conversion has left shared",
}
"""Numbers of docs/deviations.md: the model asks `differs` at each of these places."""


def differs(number: int) -> bool:
    """Tell whether the cores differ from Linux in what entry `number` says."""
    return number in DEVIATIONS


class Refused(Exception):  # noqa: N818 - it says what happened
    """A call that fails: its errno, and the offset of the page to blame."""

    def __init__(self, number: int, error_offset: int | None = None) -> None:
        super().__init__(errno.errorcode[number], error_offset)
        self.errno = number
        self.error_offset = error_offset


def require(condition: bool, number: int, page: int | None = None) -> None:
    """Refuse with `number` unless the condition holds; `page` is to blame."""
    if not condition:
        raise Refused(number, None if page is None else page * PAGE)
