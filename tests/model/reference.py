"""A reference model of conversion, restructure and accounting, small enough to read.

One host with one pool, software-protected VMs, their files and memslots. A call returns
or raises `Refused`; what it changed stands in the fields. Nothing happens at the same
time as anything else: interleavings are the business of tests/sim.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from tests.model.conversion import convert_all, convert_exactly, convert_in_place
from tests.model.inode import Hold, Inode
from tests.model.pool import Pool
from tests.model.rules import PAGE, RULES, SIZE_2M, Refused, differs, require

GUEST_MEMFD = 1 << 2
LOG_DIRTY = 1 << 0
KEEP_SIZE = 1
PUNCH_HOLE = 2
PRIVATE = 1 << 3
U64 = 1 << 64


@dataclass(frozen=True, slots=True)
class Slot:
    """A memslot: guest frames from `base` on, backed by pages of file `inode`.

    `side` is the first page of the same file that userspace maps for it.
    """

    number: int
    base: int
    inode: int
    pages: range
    side: int

    @property
    def gfns(self) -> range:
        """The guest frames."""
        return range(self.base, self.base + len(self.pages))

    def page_of(self, gfn: int) -> int:
        """Return the page of the file behind a guest frame."""
        return gfn - self.base + self.pages.start


@dataclass(frozen=True, slots=True)
class Exit:
    """A guest access that did not reach its page.

    The errno of a MEMORY_FAULT exit and whether the access was private; errno 0: MMIO;
    -1: it was refused by the file and is tried again.
    """

    errno: int
    private: bool


Reached: TypeAlias = Exit | tuple[Inode, int]
"""Where a guest access ends: an exit, or a page of a file."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a memslot names: a file, an offset in it; what userspace maps of it."""

    inode: int
    offset: int
    userspace: int


@dataclass(slots=True)
class Vm:
    """A VM: memslots by number, and the guest frames whose attribute is PRIVATE."""

    slots: dict[int, Slot] = field(default_factory=dict)
    private: bytearray = field(default_factory=bytearray)

    def slot_of(self, gfn: int) -> Slot | None:
        """Return the memslot of a guest frame."""
        return next((slot for slot in self.slots.values() if gfn in slot.gfns), None)

    def parts(self, gfns: range) -> Iterator[tuple[Slot, range]]:
        """Yield memslots by guest address, each with its pages of the file."""
        for slot in sorted(self.slots.values(), key=lambda slot: slot.base):
            start, stop = max(gfns.start, slot.base), min(gfns.stop, slot.gfns.stop)
            if start < stop:
                first = slot.page_of(start)
                yield slot, range(first, first + stop - start)


class Reference:
    """The host of one history, in one lineage."""

    def __init__(self, lineage: str, pool: Pool, gfns: int) -> None:
        self.rules = RULES[lineage]
        self.pool = pool
        self.inodes: dict[int, Inode] = {}
        self.holds: dict[int, Hold] = {}
        self.vms = {name: Vm(private=bytearray(gfns)) for name in ("a", "b")}

    # Files.

    def create(self, number: int, vm: str, size: int, flags: int, order: int) -> None:
        """KVM_CREATE_GUEST_MEMFD."""
        rules = self.rules
        rest = flags & ~(rules.size_mask << rules.size_shift)
        known = rules.huge_flag | rules.shares_with | rules.private_with
        require(not rest & ~(known | rules.shared_with), errno.EINVAL)
        shares = bool(flags & rules.shares_with)
        private = bool(flags & rules.private_with)
        shared = bool(flags & rules.shared_with)
        require(shares or not private, errno.EINVAL)
        require(not (shared and flags & rules.huge_flag), errno.EINVAL)
        page_size = self._page_size(flags, order)
        if page_size > PAGE and rules.rounds_size_up and not self._log(flags):
            assert differs(41)
            size = -(-size // page_size) * page_size
        require(size > 0 and size % page_size == 0, errno.EINVAL)
        assert page_size == self.pool.unit * PAGE, "this host has one page size"
        nr_pages = size // PAGE
        self.pool.reserve(nr_pages // self.pool.unit)
        inode = Inode(rules, self.pool, nr_pages, self.holds)
        inode.vm = vm
        if rules.shares_with:
            inode.serves_shared = inode.mappable = shares
            begins = shares and not private and rules.begins_shared
            inode.store(range(nr_pages), int(begins or shared))
        self.inodes[number] = inode

    def _log(self, flags: int) -> int:
        return flags >> self.rules.size_shift & self.rules.size_mask

    def _page_size(self, flags: int, order: int) -> int:
        huge, log = bool(flags & self.rules.huge_flag), self._log(flags)
        if self.rules.order_field:
            assert differs(71)
            require(order in ((9, 18) if huge else (0,)), errno.EINVAL)
            return PAGE << order
        require(order == 0, errno.EINVAL)
        require(huge or log == 0, errno.EINVAL)
        require(not huge or log in (0, 21, 30), errno.EINVAL)
        assert differs(36)
        return (1 << log if log else SIZE_2M) if huge else PAGE

    def close(self, number: int) -> None:
        """Close the file, and what clients have mapped of it."""
        inode = self.inodes[number]
        inode.open = False
        inode.bound.clear()
        inode.unmap(range(inode.nr_pages))
        self._evict_if_unused(number)

    def _evict_if_unused(self, number: int) -> None:
        inode = self.inodes[number]
        assert differs(18)
        holds = any(f.holds for f in (*inode.folios.values(), *inode.orphans))
        if inode.open or inode.views or (holds and self.rules.holds_keep_inode):
            return
        for index in list(inode.folios):
            inode.drop(index)
        self._unreserve_if_empty(number)

    def _unreserve_if_empty(self, number: int) -> None:
        """The last folio that comes back ends the reservation."""
        inode = self.inodes[number]
        if inode.used == 0:
            self.pool.unreserve(inode.limit)
            del self.inodes[number]
        # Folios in somebody's hands are all that may be left of it.
        inode.gone = True

    def fallocate(self, number: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        inode = self.inodes[number]
        require(offset >= 0 and length > 0, errno.EINVAL)
        known = mode & KEEP_SIZE and not mode & ~(KEEP_SIZE | PUNCH_HOLE)
        require(bool(known), errno.EOPNOTSUPP)
        unit = PAGE * (inode.unit if self.rules.whole_folios else 1)
        require(offset % unit == 0 and length % unit == 0, errno.EINVAL)
        first, last = offset // PAGE, (offset + length) // PAGE
        if mode & PUNCH_HOLE:
            stop = min(last, inode.nr_pages)
            inode.punch(range(min(first, stop), stop))
        else:
            require(last <= inode.nr_pages, errno.EINVAL)
            inode.allocate(range(first, last))

    # Holds.

    def pin(self, hold: int, number: int, pages: range, *, pin: bool) -> None:
        """Take a hold on shared pages."""
        inode = self.inodes[number]
        for page in pages:
            require(bool(inode.shared[page]), errno.EACCES, page)
        inode.fill(pages)
        self.holds[hold] = Hold(pin)
        for page in pages:
            folio = inode.folios[page // inode.unit]
            folio.holds.setdefault(hold, set()).add(page)
            self.holds[hold].folios.append(folio)

    def unpin(self, hold: int) -> None:
        """End a hold; folios that have left their file go back with the last."""
        for folio in self.holds.pop(hold).folios:
            folio.holds.pop(hold, None)
        for number, inode in list(self.inodes.items()):
            for folio in [orphan for orphan in inode.orphans if not orphan.holds]:
                inode.orphans.remove(folio)
                inode.free(folio)
            if inode.gone:
                self._unreserve_if_empty(number)
            else:
                self._evict_if_unused(number)

    # Memslots.

    def set_region(
        self, vm: str, slot: int, flags: int, gpa: int, size: int, *, target: Target
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2, its checks in the kernel's order."""
        slots = self.vms[vm].slots
        require(not flags & ~(GUEST_MEMFD | LOG_DIRTY), errno.EINVAL)
        require(flags != GUEST_MEMFD | LOG_DIRTY, errno.EINVAL)
        require(size % PAGE == 0 and gpa % PAGE == 0, errno.EINVAL)
        require(not flags or target.offset % PAGE == 0, errno.EINVAL)
        require(gpa + size < U64, errno.EINVAL)
        if size == 0:
            require(slot in slots, errno.EINVAL)
            self._delete_slot(vm, slot)
            return
        require(slot not in slots, errno.EINVAL)
        first = target.offset // PAGE
        pages = range(first, first + size // PAGE)
        side = target.userspace // PAGE
        made = Slot(slot, gpa // PAGE, target.inode, pages, side)
        for other in slots.values():
            require(not _overlap(other.gfns, made.gfns), errno.EEXIST)
        self._bind(vm, made, target.userspace)
        slots[slot] = made

    def _bind(self, vm: str, slot: Slot, userspace: int) -> None:
        inode = self.inodes.get(slot.inode)
        if inode is None or not inode.open:
            raise Refused(errno.EBADF)
        require(inode.vm == vm, errno.EINVAL)
        require(slot.pages.stop <= inode.nr_pages, errno.EINVAL)
        if self.rules.side_is_file and inode.serves_shared:
            require(userspace == slot.pages.start * PAGE, errno.EINVAL)
        taken = any(_overlap(pages, slot.pages) for pages in inode.bound.values())
        require(not taken, errno.EINVAL)
        inode.bound[vm, slot.number] = slot.pages
        # The host view and the guest view that the guest process maps.
        inode.views += 2
        if self.rules.bind_shares:
            inode.store(slot.pages, 1)

    def _delete_slot(self, vm: str, slot: int) -> None:
        number = self.vms[vm].slots.pop(slot).inode
        inode = self.inodes[number]
        inode.bound.pop((vm, slot), None)
        inode.views -= 2
        self._evict_if_unused(number)

    # Conversions.

    def set_attributes(
        self, vm: str, address: int, size: int, attributes: int, flags: int
    ) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES; in RFC_V1 it converts the files of the range."""
        supported = 0 if self.rules.every_file_decides else PRIVATE
        require(flags == 0 and not attributes & ~supported, errno.EINVAL)
        require(size > 0 and address + size < U64, errno.EINVAL)
        require(address % PAGE == 0 and size % PAGE == 0, errno.EINVAL)
        first, stop = address // PAGE, (address + size) // PAGE
        wanted = bytes([bool(attributes)]) * (stop - first)
        private = self.vms[vm].private
        if private[first:stop] == wanted:
            return
        if self.rules.vm_converts:
            parts = self.vms[vm].parts(range(first, stop))
            items = [(self.inodes[slot.inode], pages) for slot, pages in parts]
            convert_all(items, to=int(not attributes))
        private[first:stop] = wanted

    def convert_file(
        self, number: int, to: int, offset: int, size: int, error_offset: int
    ) -> None:
        """KVM_GMEM_CONVERT_SHARED and _PRIVATE."""
        inode = self.inodes[number]
        # What was given stays where it is.
        require(error_offset == 0, errno.EINVAL, error_offset // PAGE)
        if size == 0:
            return
        require(offset + size <= inode.nr_pages * PAGE, errno.EINVAL)
        require(offset % PAGE == 0 and size % PAGE == 0, errno.EINVAL)
        if inode.serves_shared:
            pages = range(offset // PAGE, (offset + size) // PAGE)
            convert_exactly(inode, pages, to)

    def set_attributes2(
        self, number: int, where: range, attributes: int, must_be_zero: int
    ) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES2; `must_be_zero`: flags, and the reserved words."""
        inode = self.inodes[number]
        require(must_be_zero == 0 and not attributes & ~PRIVATE, errno.EINVAL)
        require(len(where) > 0, errno.EINVAL)
        require(where.start % PAGE == 0 and where.stop % PAGE == 0, errno.EINVAL)
        require(where.stop <= inode.nr_pages * PAGE, errno.EINVAL)
        pages = range(where.start // PAGE, where.stop // PAGE)
        convert_in_place(inode, pages, int(not attributes))

    # Guests.

    def guest_access(self, vm: str, gfn: int, meant: int | None) -> Reached:
        """Access a page as a vCPU; `meant` 1 is private, 0 shared, None either."""
        slot = self.vms[vm].slot_of(gfn)
        if slot is not None and self._says_itself(slot):
            return self._in_place(vm, slot, gfn, meant)
        private = self.vms[vm].private[gfn]
        if meant not in (None, private):
            return Exit(errno.EFAULT, bool(meant))
        if private:
            if slot is None:
                return Exit(errno.EFAULT, private=True)
            return self._get_pfn(vm, slot, gfn, private=True)
        if slot is None:
            return Exit(0, private=False)
        if self.inodes[slot.inode].serves_shared:
            return self._get_pfn(vm, slot, gfn, private=False)
        return self._through_host_view(slot, gfn)

    def _says_itself(self, slot: Slot) -> bool:
        if self.rules.every_file_decides:
            return True
        return self.rules.file_decides and self.inodes[slot.inode].serves_shared

    def _in_place(self, vm: str, slot: Slot, gfn: int, meant: int | None) -> Reached:
        inode, page = self.inodes[slot.inode], slot.page_of(gfn)
        private = not inode.shared[page]
        if (vm, slot.number) not in inode.bound:
            return Exit(errno.EFAULT, private=meant == 1)
        if meant not in (None, private):
            return Exit(errno.EFAULT, private=bool(meant))
        if not private and not inode.serves_shared:
            return self._through_host_view(slot, gfn)
        return self._get_pfn(vm, slot, gfn, private=private)

    def _get_pfn(self, vm: str, slot: Slot, gfn: int, *, private: bool) -> Reached:
        inode, page = self.inodes[slot.inode], slot.page_of(gfn)
        if (vm, slot.number) not in inode.bound:
            return Exit(errno.EFAULT, private)
        try:
            inode.get_folio(page)
        except Refused as refused:
            return Exit(refused.errno, private)
        inode.prepare(page)
        if private and inode.shared[page] and differs(100):
            return Exit(-1, private)
        return inode, page

    def _through_host_view(self, slot: Slot, gfn: int) -> Reached:
        """The guest's shared memory is what userspace maps: the host view."""
        inode, page = self.inodes[slot.inode], slot.side + gfn - slot.base
        assert differs(13)
        try:
            # SIGBUS behind the end, like a page that is private.
            require(page < inode.nr_pages, errno.EFAULT)
            inode.host_touch(page)
        except Refused:
            return Exit(-1, private=False)
        return inode, page

    def populate(self, vm: str, gfns: range) -> list[tuple[Inode, int]]:
        """Write launch-time content into private pages; return what was written."""
        parts = list(self.vms[vm].parts(gfns))
        covered = sum(len(pages) for _, pages in parts)
        require(covered == len(gfns), errno.ENOENT)
        for slot, pages in parts:
            first = slot.base + pages.start - slot.pages.start
            attributes = self.vms[vm].private[first : first + len(pages)]
            require(self._says_itself(slot) or 0 not in attributes, errno.EACCES)
        written: list[tuple[Inode, int]] = []
        for slot, pages in parts:
            self._populate(self.inodes[slot.inode], pages)
            written += [(self.inodes[slot.inode], page) for page in pages]
        return written

    def _populate(self, inode: Inode, pages: range) -> None:
        for page in pages:
            require(not inode.shared[page], errno.EACCES, page)
        require(not inode.ready.intersection(pages), errno.EEXIST)
        inode.fill(pages)
        inode.ready.update(pages)


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop
