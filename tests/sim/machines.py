"""The VMs of a history with their files and memslots, and how they come and go."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from gmem.effects import Op, perform
from gmem.guest_memfd.core.values import ViewKind
from gmem.host_allocator.core.values import Folio
from gmem.uapi.errors import NoSuchObject
from gmem.uapi.flags import KVM_MEM_GUEST_MEMFD, VmType
from gmem.uapi.pages import PAGE_SIZE, PgRange
from gmem.vmm.core.create import create_guest_memfd
from gmem.vmm.core.memslots import Memslot, Region, Userspace
from gmem.vmm.core.set_attributes import convert_memory
from gmem.vmm.core.set_region import set_user_memory_region2
from gmem.vmm.core.vm import Vm
from tests.sim.host import Ask, Host, Wait
from tests.sim.shape import Shape, boot
from tests.sim.world import Outcome, World

CLIENTS: Final = ("loader", "device")


@dataclass(slots=True, eq=False)
class File:
    """A guest_memfd as its VMM knows it."""

    number: int
    nr_pages: int
    open: bool = True


@dataclass(slots=True, eq=False)
class Machine:
    """A VM, its files, and the guest frames that have a memslot."""

    vm: Vm
    files: list[File] = field(default_factory=list)
    slots: dict[int, PgRange] = field(default_factory=dict)

    def gfns(self, random: Random) -> PgRange:
        """Return the guest frames of one memslot."""
        return random.choice(list(self.slots.values()))

    @property
    def all_gfns(self) -> PgRange:
        """The guest frames of all memslots, and what may lie between them."""
        ranges = list(self.slots.values())
        return PgRange(min(r.start for r in ranges), max(r.stop for r in ranges))


class Machines:
    """The VMs of one history, and the host that they compete for."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.shape = Shape.draw(world.random, world.play.page_sizes)
        self.host = Host(world, boot(self.shape, world.options, world.random))
        self.at_boot = self.host.allocator.statistics().levels()
        self.machines: list[Machine] = []
        self.running = 0
        # How often the first folio is picked, on which everybody then meets.
        self.focus = world.random.choice((0.0, 0.5, 0.9))
        self._spared: tuple[Folio, ...] = ()
        self._take_base_memory()

    # The host.

    def _take_base_memory(self) -> None:
        """Let somebody have the base memory that splits would need."""
        if not self.world.options.vmemmap_short:
            return
        saved = self.shape.unit // 64 - 1
        spare = self.world.random.randint(0, 2) * max(saved, 4)
        free = sum(n.free_base_pages for n in self.host.allocator.statistics().nodes)
        if free > spare:
            self._spared = self.host.allocator.allocate(
                self.host.hog, nr_folios=free - spare
            )

    def give_base_memory(self) -> None:
        """End the shortage."""
        if self._spared:
            self.host.allocator.free(self.host.hog, self._spared)
            self._spared = ()

    # Chance.

    def pick(self, whole: PgRange) -> PgRange:
        """Pick a few pages, one unit, or all of a range; the same ones often."""
        random, unit = self.world.random, self.shape.unit
        kind = random.random()
        if kind < 0.08:
            return whole
        units = -(-len(whole) // unit)
        focused = random.random() < self.focus
        first = whole.start + (0 if focused else random.randrange(units)) * unit
        if kind < 0.3 and unit > 1:
            return PgRange(first, min(whole.stop, first + unit))
        start = first + random.choice((0, 0, 1, 7, unit - 1))
        start = min(start, whole.stop - 1)
        length = random.choice((1, 1, 2, 3, unit))
        return PgRange(start, min(whole.stop, start + length))

    # Running scripts.

    def run(self, name: str, script: Op[Any]) -> None:
        """Begin a script; a refusal ends it."""
        self.running += 1

        def done(outcome: Outcome) -> None:
            self.running -= 1
            if outcome.error is not None:
                self.world.marks[f"refused: {outcome.error.reason}"] += 1

        self.world.start(name, script, done)

    def ask(self, service: str, name: str, make: Callable[[], Op[Any]]) -> Op[Any]:
        """Have a service run an operation."""
        return perform(Ask(service, name, make))

    # Life.

    def boot(self, name: str) -> Op[None]:
        """Make a VM with its files and memslots."""
        shape = self.shape
        vm: Vm = yield from self.ask(
            "vmm",
            f"create vm {name}",
            lambda: self.host.vmm.create(name, VmType.SW_PROTECTED, self.world.lineage),
        )
        machine = Machine(vm)
        self.machines.append(machine)
        files = 1 if shape.one_file else shape.slots
        nr_pages = shape.slot_pages * shape.slots // files
        for _ in range(files):
            machine.files.append((yield from self._create_file(vm, nr_pages)))
        for slot in range(shape.slots):
            yield from self._set_slot(machine, slot)
        if self.world.random.random() < 0.7:
            yield from self.set_attributes(machine, machine.all_gfns, private=True)

    def _create_file(self, vm: Vm, nr_pages: int) -> Op[File]:
        play = self.world.play
        choices = play.file_flags_of(self.shape.page_size)
        file_flags = choices[0]
        if len(choices) > 1:
            file_flags = self.world.random.choice(choices)
        flags, order = play.creation(self.shape.page_size, file_flags)
        size = nr_pages * PAGE_SIZE
        made: str = yield from self.ask(
            "vmm", "create file", lambda: create_guest_memfd(vm, size, flags, order)
        )
        file = File(int(made), nr_pages)
        open_view = self.host.open_view
        yield from self.ask(
            "guest_memfd",
            f"open {made}",
            lambda: open_view(file.number, ViewKind.HOST),
        )
        self.host.client_views[file.number] = None
        return file

    def _set_slot(self, machine: Machine, slot: int) -> Op[None]:
        shape = self.shape
        start = slot * shape.slot_pages
        file = machine.files[0 if shape.one_file else slot]
        offset = start * PAGE_SIZE if shape.one_file else 0
        base = shape.base_gfn + start
        region = Region(
            slot,
            KVM_MEM_GUEST_MEMFD,
            base * PAGE_SIZE,
            shape.slot_pages * PAGE_SIZE,
            Userspace(str(file.number), offset),
            str(file.number),
            offset,
        )
        yield from self._set_region(machine, region)
        machine.slots[slot] = region.gfns

    def _set_region(self, machine: Machine, region: Region) -> Op[None]:
        name = machine.vm.name
        yield from self.ask(
            "vmm",
            f"set slot {region.slot} of {name}",
            lambda: set_user_memory_region2(self.host.vmm.get(name), region),
        )

    def close(self, machine: Machine) -> Op[None]:
        """Close a file."""
        yield from self.close_file(self.world.random.choice(machine.files))

    def close_file(self, file: File) -> Op[None]:
        """Close a file and the host view that the clients have."""
        if not file.open:
            return
        file.open = False
        for who in CLIENTS:
            whole = PgRange(0, file.nr_pages)
            self.host.memory.drop_mappings(who, file.number, whole)
        del self.host.client_views[file.number]
        self.host.release_view(file.number, ViewKind.HOST)
        yield from self.ask(
            "guest_memfd",
            f"close {file.number}",
            lambda: self.host.guest_memfd.close(file.number),
        )

    def delete_slot(self, machine: Machine) -> Op[None]:
        """Delete a memslot and set it again, which resets its faultability."""
        slot = self.world.random.choice(list(machine.slots))
        del machine.slots[slot]
        yield from self._set_region(machine, Region(slot, 0, 0, 0))
        yield from perform(Wait(5))
        yield from self._set_slot(machine, slot)

    def delete_vm(self, machine: Machine) -> Op[None]:
        """Delete a VM, maybe twice, and close its files; another wants their folios."""
        if self.world.random.random() < 0.5:
            self.run("delete again", self._delete(machine))
        yield from self.end(machine)
        yield from self.boot(f"{machine.vm.name[-1]}{self.world.now}")

    def end(self, machine: Machine) -> Op[None]:
        """Delete a VM, and close its files."""
        if machine not in self.machines:
            return
        self.machines.remove(machine)
        yield from self._delete(machine)
        for file in machine.files:
            yield from self.close_file(file)

    def _delete(self, machine: Machine) -> Op[None]:
        name = machine.vm.name
        with suppress(NoSuchObject):
            yield from self.ask(
                "vmm", f"delete {name}", lambda: self.host.vmm.delete(name)
            )

    def kill(self, machine: Machine) -> Op[None]:
        """End a client: what it has mapped and pinned goes."""
        who = self.world.random.choice(CLIENTS)
        self.host.memory.drop_process(who)
        yield from self.ask(
            "guest_memfd",
            f"unpin all of {who}",
            lambda: self.host.guest_memfd.client_gone(who),
        )

    # Conversions.

    def set_attributes(
        self, machine: Machine, gfns: PgRange, *, private: bool
    ) -> Op[None]:
        """Convert guest frames, as a VMM of the lineage does."""
        name = machine.vm.name
        yield from self.ask(
            "vmm",
            f"{'private' if private else 'shared'} {gfns}",
            lambda: convert_memory(
                self.host.vmm.get(name), gfns.offset, gfns.size, private=private
            ),
        )

    def forget(self, machine: Machine, gfns: PgRange) -> None:
        """MADV_DONTNEED by every client, over guest frames."""
        for slot, part in machine.vm.memslots.with_gmem(gfns):
            number, pages = pages_of(slot, part)
            for who in CLIENTS:
                self.host.memory.drop_mappings(who, number, pages)


def pages_of(slot: Memslot, gfns: PgRange) -> tuple[int, PgRange]:
    """Return the inode, and the pages of it, behind guest frames of a memslot."""
    offset = slot.file_offset(gfns.start) // PAGE_SIZE
    return int(slot.region.guest_memfd), PgRange(offset, offset + len(gfns))
