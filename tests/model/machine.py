"""A Hypothesis state machine that does everything twice: to the cores, to the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from gmem.guest_memfd.core.values import AttributesCall
from gmem.uapi.pages import PAGE_SIZE, PgRange
from gmem.vmm.core.exits import MemoryFault, NoSlot
from tests.model.comparing import CLIENTS, Twofold
from tests.model.cores import Cores, Ended
from tests.model.pool import Pool
from tests.model.reference import (
    GUEST_MEMFD,
    PRIVATE,
    PUNCH_HOLE,
    Exit,
    Reference,
    Target,
)
from tests.model.rules import RULES, Refused

FILES_MAX: Final = 3
_UNITS: Final = {1: 12, 512: 3, 1 << 18: 2}
"""The units of a file: huge pages, or single ones."""
MORE: Final[tuple[dict[str, Any], ...]] = (
    {"flags": 1},
    {"reserved": (0,) * 10 + (1,)},
    {"attributes": PRIVATE | 1},
    {"error_offset": PAGE_SIZE},
)
"""What KVM_SET_MEMORY_ATTRIBUTES2 has beside its range, where it has any."""

files = st.sampled_from((0, 0, 0, 0, 1, 2))
vms = st.sampled_from(("a", "a", "a", "a", "b"))
slots = st.sampled_from((0, 0, 0, 1, 2))
# Which unit, where in it, how many pages: few values, so that all meets all.
places = st.tuples(
    st.sampled_from((0, 0, 0, 0, 1, 1, 2)),
    st.sampled_from(("start", "start", "start", "second", "last")),
    st.sampled_from((1, 1, 2, "unit", "unit", "two units", "rest")),
)
odd = st.sampled_from((0,) * 30 + (1, PAGE_SIZE - 1, PAGE_SIZE // 2))


Method = TypeVar("Method", bound=Callable[..., None])
CALLS: Final[list[st.SearchStrategy[tuple[str, dict[str, Any]]]]] = []


def call(
    weight: int, **arguments: st.SearchStrategy[Any]
) -> Callable[[Method], Method]:
    """Have a method be called with what is drawn, `weight` times as often as another.

    Not rules: Hypothesis switches some of these off in each history (swarm testing),
    and few would be left in which all that matters comes together.
    """

    def added(method: Method) -> Method:
        for _ in range(weight):
            drawn = st.fixed_dictionaries(arguments)
            CALLS.append(st.tuples(st.just(method.__name__), drawn))
        return method

    return added


class Machine(Twofold):
    """Rules for one lineage and page size, which subclasses name."""

    @initialize()
    def boot(self) -> None:
        """Boot the host and the model of it."""
        self.unit = self.page_size // PAGE_SIZE
        self.nr_pages = _UNITS[self.unit] * self.unit
        self.scale = max(4, self.unit)
        nr = 0 if self.unit == 1 else 2 * _UNITS[self.unit] + 1
        base = 64 if self.unit == 1 else 512
        self.cores = Cores(self.lineage, self.page_size, nr, base)
        pool = Pool(self.unit, nr, self.cores.free_base_pages)
        self.model = Reference(str(self.lineage), pool, gfns=4 * self.nr_pages)
        self.series = RULES[str(self.lineage)]
        self.open: list[int] = []
        self.held: list[int] = []
        self.written: dict[Any, int] = {}
        self.serial = 0
        # Something to begin with.
        for vm in ("a", "b"):
            # Of a file that begins private little can be held.
            begins = self.series.shared_with if vm == "a" else 0
            self.create(vm=vm, units=3, extra=0, flags=begins, bits=0, good=True)
            self.set_region(
                vm=vm,
                slot=0,
                file=len(self.open) - 1,
                unit=0,
                first=0,
                units=2,
                odd=(0, 0, 0),
                flags=GUEST_MEMFD,
                elsewhere=0,
            )

    # Choosing.

    def file(self, index: int) -> int | None:
        """Return a file that is open."""
        return self.open[index % len(self.open)] if self.open else None

    def pages(self, place: tuple[int, str, Any], limit: int) -> range:
        """Return pages of a place, below `limit`."""
        index, where, length = place
        inside = {"start": 0, "second": 1, "last": self.unit - 1}[where]
        start = min(index * self.unit + inside, limit - 1)
        sizes = {"unit": self.unit, "two units": 2 * self.unit, "rest": limit}
        nr = sizes.get(length, length)
        return range(start, min(limit, start + nr))

    # Files.

    @call(
        1,
        vm=vms,
        units=st.sampled_from((1, 1, 2, 3, 3, 0)),
        extra=odd,
        flags=st.integers(0, 7),
        bits=st.sampled_from((0, 0, 0, 0, 1 << 3, 5)),
        good=st.sampled_from((True, True, True, False)),
    )
    def create(
        self, *, vm: str, units: int, extra: int, flags: int, bits: int, good: bool
    ) -> None:
        """KVM_CREATE_GUEST_MEMFD, with flags that may be nonsense."""
        if len(self.open) == FILES_MAX:
            return
        log = self.page_size.bit_length() - 1 if self.unit > 1 else 0
        size = min(units * self.scale, self.nr_pages) * PAGE_SIZE
        if good:
            huge = self.series.huge_flag if self.unit > 1 else 0
            begins = self.series.private_with
            begins |= self.series.shared_with if self.unit == 1 else 0
            flags = huge | self.series.shares_with | (flags & begins)
        else:
            size += extra
            log ^= bits
        order = 0
        if self.series.order_field:
            order = log - 12 if log >= 12 else log
        else:
            flags |= log << self.series.size_shift
        if not good and not self._is_of_this_host(flags, order):
            return
        what = vm, size, flags, order
        made = self.cores.create(*what)
        number = made.value if made.errno == 0 else -1
        if self.same(made, self.model.create, number, *what) is not None:
            self.open.append(number)

    def _is_of_this_host(self, flags: int, order: int) -> bool:
        """Tell whether a flag word is bad, or asks for this host's page size."""
        if self.series.order_field:
            huge = bool(flags & self.series.huge_flag)
            return order == self.unit.bit_length() - 1 or huge is (order == 0)
        log = flags >> self.series.size_shift & self.series.size_mask
        if not flags & self.series.huge_flag:
            return log != 0 or self.unit == 1
        return log not in (0, 21, 30) or (1 << (log or 21)) == self.page_size

    @call(1, file=files, really=st.sampled_from((False, False, True)))
    def close(self, file: int, really: bool) -> None:
        """Close a file, now and then."""
        number = self.file(file)
        if number is not None and len(self.open) > 1 and really:
            self.open.remove(number)
            self.same(self.cores.close(number), self.model.close, number)

    @call(
        4,
        file=files,
        place=places,
        odd=odd,
        mode=st.sampled_from((3,) * 6 + (1,) * 4 + (0,)),
    )
    def fallocate(self, file: int, place: Any, odd: int, mode: int) -> None:
        """Allocate, punch, or something that is refused."""
        number = self.file(file)
        if number is None:
            return
        limit = self.model.inodes[number].nr_pages
        pages = self.pages(place, limit + self.unit * (mode & PUNCH_HOLE))
        if self.series.whole_folios and isinstance(place[2], str):
            first, last = pages.start // self.unit, -(-pages.stop // self.unit)
            pages = range(first * self.unit, last * self.unit)
        offset = pages.start * PAGE_SIZE + odd
        size = len(pages) * PAGE_SIZE - odd
        ended = self.cores.fallocate(number, mode, offset, size)
        self.same(ended, self.model.fallocate, number, mode, offset, size)

    # Userspace.

    @call(
        4,
        file=files,
        place=places,
        who=st.sampled_from(CLIENTS),
        write=st.booleans(),
    )
    def touch(self, file: int, place: Any, who: str, write: bool) -> None:
        """Load or store through the host view."""
        number = self.file(file)
        if number is None:
            return
        inode = self.model.inodes[number]
        page = self.pages(place, inode.nr_pages).start
        done = self.cores.touch(who, number, page, write=write)
        try:
            inode.host_touch(page)
        except Refused:
            assert not done
            return
        assert done
        inode.mapped.add((who, page))
        if write:
            self.wrote([(inode, page)])

    @call(1, file=files, place=places)
    def dont_need(self, file: int, place: Any) -> None:
        """MADV_DONTNEED by every client."""
        number = self.file(file)
        if number is None:
            return
        inode = self.model.inodes[number]
        pages = self.pages(place, inode.nr_pages)
        for who in CLIENTS:
            self.cores.dont_need(who, number, PgRange(pages.start, pages.stop))
        inode.unmap(pages)

    @call(2, file=files, place=places, pin=st.booleans())
    def pin(self, file: int, place: Any, pin: bool) -> None:
        """Take a hold on up to four pages."""
        number = self.file(file)
        if number is None or len(self.held) == 3:
            return
        pages = self.pages(place, self.model.inodes[number].nr_pages)[:4]
        taken = self.cores.pin(number, pages, pin=pin)
        hold = taken.value if taken.errno == 0 else -1
        if self.same(taken, self.model.pin, hold, number, pages, pin=pin) is not None:
            self.held.append(hold)

    @call(2, index=st.integers(0, 2))
    def unpin(self, index: int) -> None:
        """End a hold."""
        if self.held:
            hold = self.held.pop(index % len(self.held))
            self.same(self.cores.unpin(hold), self.model.unpin, hold)

    # Memslots and conversions.

    @call(
        4,
        vm=vms,
        slot=slots,
        file=files,
        unit=st.integers(0, 3),
        first=st.sampled_from((0, 0, 0, 1)),
        units=st.sampled_from((0, 0, 1, 2, 2, 3)),
        odd=st.tuples(odd, odd, odd),
        flags=st.sampled_from((GUEST_MEMFD,) * 6 + (GUEST_MEMFD | 1, 1 << 4)),
        elsewhere=st.sampled_from((0, 0, 0, 0, 0, PAGE_SIZE)),
    )
    def set_region(
        self,
        *,
        vm: str,
        slot: int,
        file: int,
        unit: int,
        first: int,
        units: int,
        odd: tuple[int, int, int],
        flags: int,
        elsewhere: int,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2: create, delete, or something refused."""
        number = self.file(file)
        if number is None:
            return
        gpa = unit * self.scale * PAGE_SIZE + odd[0]
        size = units * self.scale * PAGE_SIZE + odd[1]
        offset = first * self.scale * PAGE_SIZE + odd[2]
        if size == 0:
            flags = 0
        side = offset // PAGE_SIZE * PAGE_SIZE + elsewhere
        where = vm, slot, flags, gpa, size
        ended = self.cores.set_region(*where, target=(number, offset, side))
        target = Target(number, offset, side)
        self.same(ended, self.model.set_region, *where, target=target)

    @call(1, vm=vms, slot=slots)
    def rebind(self, vm: str, slot: int) -> None:
        """Delete a memslot and set it again as it was."""
        found = self.model.vms[vm].slots.get(slot)
        if found is None or found.inode not in self.open:
            return
        size, offset = len(found.pages) * PAGE_SIZE, found.pages.start * PAGE_SIZE
        target = found.inode, offset, offset
        for flags, nr in ((0, 0), (GUEST_MEMFD, size)):
            where = vm, slot, flags, found.base * PAGE_SIZE, nr
            ended = self.cores.set_region(*where, target=target)
            self.same(ended, self.model.set_region, *where, target=Target(*target))

    def _gfns(self, vm: str, slot: int, place: Any) -> range:
        """Return guest frames of a memslot, and maybe some behind it."""
        there = sorted(self.model.vms[vm].slots.items())
        base = there[slot % len(there)][1].base if there else 0
        limit = min(len(self.model.vms[vm].private) - base, 3 * self.unit + 1)
        pages = self.pages(place, limit)
        return range(pages.start + base, pages.stop + base)

    @call(
        5,
        vm=vms,
        slot=slots,
        place=places,
        attributes=st.sampled_from((0, PRIVATE) * 10 + (PRIVATE | 1,)),
        odd=odd,
        flags=st.sampled_from((0,) * 20 + (1,)),
        polite=st.booleans(),
    )
    def set_attributes(
        self,
        *,
        vm: str,
        slot: int,
        place: Any,
        attributes: int,
        odd: int,
        flags: int,
        polite: bool,
    ) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES, after MADV_DONTNEED where the VMM is polite.

        Where files have the attributes such a VMM converts those of its memslots.
        """
        gfns = self._gfns(vm, slot, place)
        if polite and self.series.attributes2:
            for found, pages in list(self.model.vms[vm].parts(gfns)):
                if found.inode in self.open:
                    to = int(attributes != PRIVATE)
                    self._set_attributes2(found.inode, pages, to, odd)
            return
        if polite:
            for found, pages in self.model.vms[vm].parts(gfns):
                inode = self.model.inodes[found.inode]
                for who in CLIENTS:
                    self.cores.dont_need(
                        who, found.inode, PgRange(pages.start, pages.stop)
                    )
                inode.unmap(pages)
        arguments = gfns.start * PAGE_SIZE + odd, len(gfns) * PAGE_SIZE, attributes
        ended = self.cores.set_attributes(vm, *arguments, flags)
        self.same(ended, self.model.set_attributes, vm, *arguments, flags)

    @call(
        5,
        file=files,
        place=places,
        to=st.integers(0, 1),
        odd=odd,
        more=st.sampled_from(({},) * 12 + MORE),
    )
    def convert_file(
        self,
        *,
        file: int,
        place: Any,
        to: int,
        odd: int,
        more: dict[str, Any],
    ) -> None:
        """KVM_GMEM_CONVERT_* or KVM_SET_MEMORY_ATTRIBUTES2, where the file has it."""
        number = self.file(file)
        if number is None or not self.series.file_decides:
            return
        limit = self.model.inodes[number].nr_pages
        pages = self.pages(place, limit)
        if self.series.attributes2:
            self._set_attributes2(number, pages, to, odd, **more)
            return
        where = pages.start * PAGE_SIZE + odd, len(pages) * PAGE_SIZE
        offset = more.get("error_offset", 0)
        ended = self.cores.convert_file(number, to, *where, offset)
        self.same(ended, self.model.convert_file, number, to, *where, offset)

    def _set_attributes2(
        self, number: int, pages: range, to: int, odd: int, **more: Any
    ) -> None:
        where = range(pages.start * PAGE_SIZE + odd, pages.stop * PAGE_SIZE + odd)
        call = AttributesCall(where.start, len(where), 0 if to else PRIVATE)
        call = replace(call, **more)
        ended = self.cores.set_attributes2(number, call)
        zero = call.flags | max(call.reserved)
        what = where, call.attributes, zero
        self.same(ended, self.model.set_attributes2, number, *what)

    # Guests.

    @call(
        5,
        vm=vms,
        slot=slots,
        place=places,
        meant=st.sampled_from((None, None, None, 0, 1)),
        write=st.booleans(),
    )
    def guest_access(
        self, vm: str, slot: int, place: Any, meant: int | None, write: bool
    ) -> None:
        """One attempt of a vCPU to load or store."""
        gfn = self._gfns(vm, slot, place).start
        found = self.cores.guest_access(vm, gfn, meant, write=write)
        reached = self.model.guest_access(vm, gfn, meant)
        self.steps["guest_access"] += 1
        match found:
            case NoSlot():
                assert reached == Exit(0, private=False)
            case MemoryFault(errno=errno, private=private):
                assert reached == Exit(errno, private)
            case Ended(errno=0):
                assert not isinstance(reached, Exit), reached
                if write:
                    self.wrote([reached])
            case _:
                assert isinstance(reached, Exit)
                assert reached.errno == -1

    @call(2, vm=vms, slot=slots, place=places)
    def populate(self, vm: str, slot: int, place: Any) -> None:
        """Write launch-time content."""
        gfns = self._gfns(vm, slot, place)[:3]
        ended = self.cores.populate(vm, gfns)
        written = self.same(ended, self.model.populate, vm, gfns)
        if written is not None:
            self.wrote(written)

    # Base memory.

    @call(1, folios=st.sampled_from((0, 0, 1, 2, 4)))
    def run_short(self, folios: int) -> None:
        """Somebody takes base memory, which splits need."""
        leave = folios * max(self.model.pool.vmemmap, 3)
        self.model.pool.base -= self.cores.take_base(leave)

    @call(1)
    def recover(self) -> None:
        """And gives it back."""
        self.model.pool.base += self.cores.give_base()

    @rule(call=st.deferred(lambda: st.one_of(CALLS)))
    def step(self, call: tuple[str, dict[str, Any]]) -> None:
        """Make one call of those above."""
        name, arguments = call
        getattr(self, name)(**arguments)
