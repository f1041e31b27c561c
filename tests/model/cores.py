"""The shipped cores as the model's machine calls them: one operation at a time.

They run in the world of tests/sim without a fault: every message arrives, nothing else
is under way, and a call is over when nothing is left to happen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from gmem.effects import Op, perform
from gmem.guest_memfd.core.inode import Inode
from gmem.guest_memfd.core.inodes import ByteRange
from gmem.guest_memfd.core.values import AttributesCall, HoldKind, ViewKind
from gmem.host_allocator.core.host_memory import HostMemory
from gmem.host_allocator.core.values import BootPool
from gmem.uapi.errors import KernelError
from gmem.uapi.flags import FALLOC_FL_PUNCH_HOLE, Faultability, VmType
from gmem.uapi.lineage import Lineage
from gmem.uapi.pages import PAGE_SIZE, PgRange
from gmem.vmm.core.create import create_guest_memfd
from gmem.vmm.core.exits import Access, Mapped, MemoryFault, NoSlot
from gmem.vmm.core.fault import Fault, fault
from gmem.vmm.core.memslots import Region, Userspace
from gmem.vmm.core.populate import populate_memory
from gmem.vmm.core.set_attributes import set_memory_attributes
from gmem.vmm.core.set_region import set_user_memory_region2
from gmem.vmm.core.vm import Vm
from tests.sim import checkers
from tests.sim.host import Host, Touch
from tests.sim.memory import Tag, guest_process
from tests.sim.moment import Moment
from tests.sim.options import Options
from tests.sim.world import Outcome, World

_ACCESS: Final = {None: Access.BY_ATTRIBUTE, 1: Access.PRIVATE, 0: Access.SHARED}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a call ended: errno 0 and a value, or errno and the offset to blame."""

    errno: int = 0
    error_offset: int | None = None
    value: Any = None


class Cores:
    """A host of `nr` folios beside `base` pages of base memory, and two VMs on it."""

    def __init__(self, lineage: Lineage, page_size: int, nr: int, base: int) -> None:
        self.world = World(0, Options(), lineage)
        self.page_size = page_size
        self.host = Host(self.world, _boot(page_size, nr, base))
        self.host.on_converted.append(
            partial(checkers.split_iff_some_page_is_shared, self.host)
        )
        self._hogged: tuple[Any, ...] = ()
        for name in ("a", "b"):
            make = partial(self.host.vmm.create, name, VmType.SW_PROTECTED, lineage)
            assert self._call(make).errno == 0

    # Running.

    def _call(self, make: Callable[[], Op[Any]]) -> Ended:
        """Run an operation until nothing is left to happen."""
        outcomes: list[Outcome] = []

        def body() -> Op[Any]:
            return (yield from make())

        self.world.start("call", body(), outcomes.append)
        while self.world.step():
            pass
        (outcome,) = outcomes
        if outcome.error is None:
            return Ended(value=outcome.value)
        error: KernelError = outcome.error
        offset = error.numbers.get("error_offset")
        assert error.errno is not None
        return Ended(error.errno, offset if isinstance(offset, int) else None)

    def vm(self, name: str) -> Vm:
        """Return a VM."""
        return self.host.vmm.get(f"hosts/h/vms/{name}")

    def inode(self, number: int) -> Inode:
        """Return a file."""
        return self.host.guest_memfd.inode(number)

    # Files.

    def create(self, vm: str, size: int, flags: int, order: int) -> Ended:
        """KVM_CREATE_GUEST_MEMFD, and a host view for the clients."""
        made = self._call(lambda: create_guest_memfd(self.vm(vm), size, flags, order))
        if made.errno:
            return made
        number = int(made.value)
        self._call(lambda: self.host.open_view(number, ViewKind.HOST))
        self.host.client_views[number] = None
        return Ended(value=number)

    def close(self, number: int) -> Ended:
        """Close the file and the clients' view of it."""
        whole = self.inode(number).whole
        for who in ("loader", "device"):
            self.dont_need(who, number, whole)
        del self.host.client_views[number]
        self.host.release_view(number, ViewKind.HOST)
        return self._call(lambda: self.host.guest_memfd.close(number))

    def fallocate(self, number: int, mode: int, offset: int, length: int) -> Ended:
        """fallocate(2)."""
        core = self.host.guest_memfd
        pages = PgRange(0, 0)
        if mode & FALLOC_FL_PUNCH_HOLE:
            stop = max(0, offset + length) // PAGE_SIZE + 1
            pages = PgRange(min(stop, offset // PAGE_SIZE), stop)
        # Of these a load may see anything until the model has been asked.
        with self.host.memory.punching(number, pages):
            return self._call(lambda: core.fallocate(number, mode, offset, length))

    def pin(self, number: int, pages: range, *, pin: bool) -> Ended:
        """Take a hold; return its number."""
        target = ByteRange(number, pages.start * PAGE_SIZE, len(pages) * PAGE_SIZE)
        kind = HoldKind.PIN if pin else HoldKind.PLAIN
        core = self.host.guest_memfd
        return self._call(
            lambda: core.pin(target, kind, holder="device", client="device")
        )

    def unpin(self, hold: int) -> Ended:
        """End a hold."""
        return self._call(lambda: self.host.guest_memfd.unpin(hold))

    # VMs.

    def set_region(
        self,
        vm: str,
        slot: int,
        flags: int,
        gpa: int,
        size: int,
        *,
        target: tuple[int, int, int],
    ) -> Ended:
        """KVM_SET_USER_MEMORY_REGION2; `target` is file, offset, userspace offset."""
        number, offset, userspace = target
        side = Userspace(str(number), userspace)
        region = Region(slot, flags, gpa, size, side, str(number), offset)
        return self._call(lambda: set_user_memory_region2(self.vm(vm), region))

    def set_attributes(
        self, vm: str, address: int, size: int, attributes: int, flags: int
    ) -> Ended:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        return self._call(
            lambda: set_memory_attributes(
                self.vm(vm), address, size, attributes=attributes, flags=flags
            )
        )

    def convert_file(
        self, number: int, to: int, offset: int, size: int, error_offset: int
    ) -> Ended:
        """KVM_GMEM_CONVERT_SHARED and _PRIVATE."""
        value = Faultability.ALL if to else Faultability.GUEST
        return self._call(
            lambda: self.host.guest_memfd.convert_ioctl(
                number, value, offset=offset, size=size, error_offset=error_offset
            )
        )

    def set_attributes2(self, number: int, call: AttributesCall) -> Ended:
        """KVM_SET_MEMORY_ATTRIBUTES2."""
        return self._call(lambda: self.host.guest_memfd.attributes_ioctl(number, call))

    def populate(self, vm: str, gfns: range) -> Ended:
        """PopulateMemory."""
        return self._call(
            lambda: populate_memory(
                self.vm(vm),
                gfns.start * PAGE_SIZE,
                len(gfns) * PAGE_SIZE,
                descriptor="image",
                source_offset=0,
            )
        )

    # Loads and stores.

    def touch(self, who: str, number: int, page: int, *, write: bool) -> bool:
        """Touch a page of the host view; False where the process dies."""
        return self._touch(who, number, ViewKind.HOST, page, write=write)

    def dont_need(self, who: str, number: int, pages: PgRange) -> None:
        """MADV_DONTNEED."""
        self.host.memory.drop_mappings(who, number, pages)

    def guest_access(
        self, vm: str, gfn: int, meant: int | None, *, write: bool
    ) -> Ended | MemoryFault | NoSlot:
        """One attempt of a vCPU; errno -1 where the file refuses the access."""
        where = self.vm(vm)
        ended = self._call(lambda: fault(where, Fault(gfn, 1, _ACCESS[meant], write)))
        outcome = ended.value
        if not isinstance(outcome, Mapped):
            assert isinstance(outcome, MemoryFault | NoSlot), outcome
            return outcome
        slot = where.memslots.find(gfn)
        assert slot is not None
        number = int(slot.region.guest_memfd)
        page = slot.file_offset(gfn) // PAGE_SIZE
        side = slot.region.userspace
        if outcome.window == slot.userspace_window and not slot.gmem_only:
            assert side is not None
            page = side.offset // PAGE_SIZE + gfn - slot.gfns.start
        view = self.host.view_of(where.name, outcome.window)
        assert view is not None
        who = guest_process(where.name)
        return Ended(0 if self._touch(who, number, view, page, write=write) else -1)

    def _touch(
        self, who: str, number: int, view: ViewKind, page: int, *, write: bool
    ) -> bool:
        inode = self.inode(number)
        if view is ViewKind.HOST and not inode.rules.creation.host_mmap(inode.options):
            # There is no mapping to touch: mmap was ENODEV.
            return False
        if page not in inode.whole:
            # SIGBUS: behind the end.
            return False
        ended = self._call(lambda: perform(Touch(who, number, view, page, write)))
        return bool(ended.value)

    # Base memory, and looking.

    def take_base(self, leave: int) -> int:
        """Let somebody have base memory but for `leave` pages; return how many."""
        count = max(0, self.free_base_pages - leave)
        allocate = partial(self.host.allocator.allocate, self.host.hog)
        while (missing := self.free_base_pages - leave) > 0:
            self._hogged += allocate(nr_folios=missing)
        return count

    def give_base(self) -> int:
        """Give it back; return how many."""
        hogged, self._hogged = self._hogged, ()
        if hogged:
            self.host.allocator.free(self.host.hog, hogged)
        return len(hogged)

    @property
    def free_base_pages(self) -> int:
        """The base pages of all nodes that are free."""
        return sum(
            node.free_base_pages for node in self.host.allocator.base.statistics()
        )

    def content(self) -> dict[tuple[int, int], Tag]:
        """Return the bytes of pages that were filled, where not zero, by file and page.

        Also of folios that no view shows until they are split.
        """
        unit = self.page_size // PAGE_SIZE
        units: dict[int, tuple[int, int]] = {
            entry.folio.pfn: (inode.number, index)
            for inode, folios in Moment.now(self.host).folios
            for index, entry in folios
        }
        found = {}
        for frame, tag in self.host.memory.tags.items():
            number, index = units.get(frame // unit * unit, (0, 0))
            page = index + frame % unit
            if number and self.host.memory.tables[number].uptodate[page]:
                found[number, page] = tag
        return found

    def check(self) -> None:
        """Call the checkers of one moment, and those of an idle host."""
        checkers.check(self.host)
        checkers.everything_is_at_rest(self.host)


def _boot(page_size: int, nr: int, base: int) -> HostMemory:
    if page_size == PAGE_SIZE:
        return HostMemory([base])
    pages = nr * (page_size // PAGE_SIZE)
    pages += (pages // 60 + 64) // 512 * 512 + base
    return HostMemory([pages], [BootPool(page_size, nr)])
