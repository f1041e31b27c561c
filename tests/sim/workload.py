"""What people do to a host: scripts, each an operation over `Ask`, `Touch` and `Wait`.

Two VMs compete for one pool, each with one or two memslots; clients map host views, pin
and punch; vCPUs load, store and ask for conversions. Pages are picked from few, so that
everything meets everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Final, TypeAlias

from gmem.effects import Op, perform
from gmem.guest_memfd.core.inodes import ByteRange
from gmem.guest_memfd.core.values import HoldKind, ViewKind
from gmem.uapi.errors import Contended, Errno
from gmem.uapi.flags import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    Faultability,
)
from gmem.uapi.pages import PAGE_SIZE, PgRange, order_of
from gmem.vmm.core.exits import Access, Mapped, MemoryFault, Retry
from gmem.vmm.core.fault import Fault, fault
from gmem.vmm.core.policy import Policy, answer
from gmem.vmm.core.populate import populate_memory
from gmem.vmm.core.vm import Vm
from tests.sim.host import Touch, Wait
from tests.sim.machines import CLIENTS, File, Machine, pages_of
from tests.sim.memory import guest_process
from tests.sim.strikes import Strikes
from tests.sim.world import World

ACTIONS: Final = 90
GAP_MAX: Final = 8
RETRY_MAX: Final = 20
SCRIPTS_MAX: Final = 14
ATTEMPTS_MAX: Final = 8
"""Faults of one guest access, each answered too late or refused."""


Action: TypeAlias = Callable[[Machine], Op[None]]


class Workload(Strikes):
    """The scripts of one history, and what they have made so far."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.holds: list[int] = []
        self._crowd = [
            *[self.guest_access] * 5,
            *[self.host_access] * 2,
            *[self.punch] * 2,
            *[self.convert] * 2,
            self.allocate,
        ]

    # Running scripts.

    def begin(self) -> None:
        """Boot two VMs; then something begins every few ticks, ACTIONS times."""
        for name in ("a", "b"):
            self.run(f"boot {name}", self.boot(name))
        self.world.later(30, lambda: self._next(ACTIONS))

    def _next(self, left: int) -> None:
        random = self.world.random
        machines = [m for m in self.machines if m.slots]
        if machines:
            self._act(random.choice(machines))
        if left > 1:
            self.world.later(random.randint(0, GAP_MAX), lambda: self._next(left - 1))

    def _act(self, machine: Machine) -> None:
        random = self.world.random
        actions = [
            *[self.convert] * 7,
            *[self.guest_access] * 5,
            *[self.host_access] * 5,
            *[self.stampede] * 6,
            *[self.punch] * 3,
            self.allocate,
            *[self.balloon] * 8,
            *[self.bounce] * 3,
            *[self.pin] * 2,
            self.unpin,
            self.populate,
            self.remote,
            self.dontneed,
        ]
        if self.world.play.in_place:
            actions += [self.convert_file] * 4
        if self.world.play.attributes2:
            actions += [self.convert_onward] * 4
        if self.world.options.poison:
            actions += [self.ail] * 2
        if self.world.options.endings:
            actions += [*[self.close] * 2, self.delete_slot, self.delete_vm, self.kill]
        self._run(random.choice(actions), machine)

    def _run(self, action: Action, machine: Machine) -> None:
        """Begin something on a VM, unless too much is under way already."""
        if not machine.slots or self.running >= SCRIPTS_MAX:
            return
        self.run(f"{action.__name__} of {machine.vm.name}", action(machine))

    # Memory.

    def host_access(self, machine: Machine) -> Op[None]:
        """Load or store through the host view, as a client or a device does."""
        random = self.world.random
        file = random.choice(machine.files)
        write = random.random() < 0.6
        for pgoff in islice(self.pick(PgRange(0, file.nr_pages)), 2):
            yield from self._touch_host(file.number, pgoff, write=write)

    def _touch_host(self, number: int, pgoff: int, *, write: bool) -> Op[bool]:
        who = self.world.random.choice(CLIENTS)
        return perform(Touch(who, number, ViewKind.HOST, pgoff, write))

    def stampede(self, machine: Machine) -> Op[None]:
        """Let everybody at the same folio at the same time."""
        random = self.world.random
        focus, self.focus = self.focus, 1.0
        for _ in range(random.randint(3, 12)):
            self._run(random.choice(self._crowd), machine)
            yield from perform(Wait(random.randint(0, 4)))
        self.focus = focus

    def balloon(self, machine: Machine) -> Op[None]:
        """Give a folio back while the guest touches pages of it for the first time."""
        where = self._unit(machine)
        if where is None:
            return
        number, whole, gfns = where
        # Split, as its first page is shared, and nothing of it handed out.
        yield from self._punch(number, whole)
        yield from self._make_private(machine, gfns)
        yield from self._share_first(machine, gfns)
        yield from self._touch_host(number, whole.start, write=True)
        # Who is first?
        self.run("give back", self._punch(number, whole))
        yield from self._touch_guest(machine, gfns)

    def bounce(self, machine: Machine) -> Op[None]:
        """Share a page of a folio while the guest touches others of it."""
        where = self._unit(machine)
        if where is None:
            return
        number, whole, gfns = where
        yield from self._make_private(machine, gfns)
        if self.world.random.random() < 0.6:
            yield from self._punch(number, whole)
        self.run("share", self._share_first(machine, gfns))
        yield from self._touch_guest(machine, gfns)

    def ail(self, machine: Machine) -> Op[None]:
        """Share a page of a folio that has a memory error, while the guest uses it."""
        where = self._unit(machine)
        if where is None:
            return
        number, whole, gfns = where
        yield from self._make_private(machine, gfns)
        yield from self._touch_guest(machine, gfns)
        yield from self.poison(
            number, self.world.random.randrange(whole.start, whole.stop)
        )
        yield from self._share_first(machine, gfns)
        yield from self._touch_guest(machine, gfns)

    def _unit(self, machine: Machine) -> tuple[int, PgRange, PgRange] | None:
        """Pick a unit of a memslot; return its inode, its pages, its guest frames."""
        random, unit = self.world.random, self.shape.unit
        slot = machine.vm.memslots.get(random.choice(list(machine.slots)))
        if slot is None:
            return None
        number, pages = pages_of(slot, slot.gfns)
        focused = random.random() < self.focus
        skip = 0 if focused else random.randrange(len(pages) // unit) * unit
        index, gfn = pages.start + skip, slot.gfns.start + skip
        return number, PgRange(index, index + unit), PgRange(gfn, gfn + unit)

    def _make_private(self, machine: Machine, gfns: PgRange) -> Op[None]:
        self.forget(machine, gfns)
        return self.set_attributes(machine, gfns, private=True)

    def _share_first(self, machine: Machine, gfns: PgRange) -> Op[None]:
        first = PgRange(gfns.start, gfns.start + 1)
        return self.set_attributes(machine, first, private=False)

    def _touch_guest(self, machine: Machine, gfns: PgRange) -> Op[None]:
        """Have vCPUs touch pages of a unit, one soon after the other."""
        random = self.world.random
        for number in range(random.randint(1, 4)):
            yield from perform(Wait(random.randint(0, 12)))
            gfn = max(gfns.start, gfns.stop - 1 - number)
            script = self._guest_access(machine.vm, gfn, Access.BY_ATTRIBUTE)
            self.run("guest touch", script)

    def dontneed(self, machine: Machine) -> Op[None]:
        """MADV_DONTNEED by every client, over some pages."""
        file = self.world.random.choice(machine.files)
        pages = self.pick(PgRange(0, file.nr_pages))
        for who in CLIENTS:
            self.host.memory.drop_mappings(who, file.number, pages)
        yield from ()

    def punch(self, machine: Machine) -> Op[None]:
        """Punch a hole; nothing written before it may be read after it."""
        file = self.world.random.choice(machine.files)
        yield from self._punch(file.number, self._pick_to_fallocate(file))

    def allocate(self, machine: Machine) -> Op[None]:
        """Allocate ahead of use."""
        file = self.world.random.choice(machine.files)
        pages = self._pick_to_fallocate(file)
        yield from self.ask(
            "guest_memfd",
            f"allocate {file.number} {pages}",
            lambda: self.host.guest_memfd.fallocate(
                file.number, FALLOC_FL_KEEP_SIZE, pages.offset, pages.size
            ),
        )

    def _punch(self, number: int, pages: PgRange) -> Op[None]:
        before = self.world.now
        mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

        def op() -> Op[None]:
            memory = self.host.memory
            fallocate = self.host.guest_memfd.fallocate
            with memory.punching(number, pages):
                try:
                    yield from fallocate(number, mode, pages.offset, pages.size)
                except Contended:
                    self.world.marks["refused punch"] += 1
                    raise
            memory.note_hole(number, pages, before)

        yield from self.ask("guest_memfd", f"punch {number} {pages}", op)

    def pin(self, machine: Machine) -> Op[None]:
        """Take a hold on shared pages."""
        random = self.world.random
        file = random.choice(machine.files)
        pages = self.pick(PgRange(0, file.nr_pages))
        yield from self._pin(file.number, pages)

    def _pin(self, number: int, pages: PgRange) -> Op[int]:
        random = self.world.random
        target = ByteRange(number, pages.offset, min(pages.size, 4 * PAGE_SIZE))
        kind = random.choice((HoldKind.PIN, HoldKind.PIN, HoldKind.PLAIN))
        who = random.choice(CLIENTS)
        hold: int = yield from self.ask(
            "guest_memfd",
            f"pin {target}",
            lambda: self.host.guest_memfd.pin(target, kind, holder=who, client=who),
        )
        self.holds.append(hold)
        return hold

    def unpin(self, machine: Machine) -> Op[None]:
        """End a hold."""
        if self.holds:
            hold = self.holds.pop(self.world.random.randrange(len(self.holds)))
            yield from self._unpin(hold)

    def _unpin(self, hold: int) -> Op[None]:
        return self.ask(
            "guest_memfd",
            f"unpin {hold}",
            lambda: self.host.guest_memfd.unpin(hold),
        )

    def populate(self, machine: Machine) -> Op[None]:
        """Write launch-time content into private pages."""
        gfns = self.pick(machine.gfns(self.world.random))
        address, size = gfns.offset, min(gfns.size, 2 * PAGE_SIZE)
        name = machine.vm.name
        yield from self.ask(
            "vmm",
            f"populate {gfns}",
            lambda: populate_memory(
                self.host.vmm.get(name),
                address,
                size,
                descriptor="image",
                source_offset=0,
            ),
        )

    def remote(self, machine: Machine) -> Op[None]:
        """Read or write bytes as a client of another machine does."""
        random = self.world.random
        file = random.choice(machine.files)
        pages = self.pick(PgRange(0, file.nr_pages))
        size = min(pages.size, 4 * PAGE_SIZE)
        target = ByteRange(file.number, pages.offset, size)
        core = self.host.guest_memfd
        if random.random() < 0.5:
            yield from self.ask(
                "guest_memfd", f"read {target}", lambda: core.read(target)
            )
        else:
            data = bytes(size)
            yield from self.ask(
                "guest_memfd",
                f"write {target}",
                lambda: core.write(file.number, pages.offset, data),
            )

    def convert(self, machine: Machine) -> Op[None]:
        """KVM_SET_MEMORY_ATTRIBUTES, after MADV_DONTNEED where the VMM is polite."""
        random = self.world.random
        gfns = self.pick(machine.all_gfns)
        private = random.random() < 0.5
        if private and not self.world.chance(self.world.options.rude):
            self.forget(machine, gfns)
        yield from self.set_attributes(machine, gfns, private=private)

    def convert_file(self, machine: Machine) -> Op[None]:
        """Convert pages of a file by its own ioctl, memslot or not."""
        random = self.world.random
        file = random.choice(machine.files)
        pages = self.pick(PgRange(0, file.nr_pages))
        to = random.choice(list(Faultability))
        yield from self._convert_file(file.number, pages, to)

    def _convert_file(self, number: int, pages: PgRange, to: Faultability) -> Op[None]:
        target = ByteRange(number, pages.offset, pages.size)
        return self.ask(
            "guest_memfd",
            f"ioctl {target} {to.name}",
            lambda: self.host.convert_file(target, to),
        )

    def convert_onward(self, machine: Machine) -> Op[None]:
        """Convert a file of which somebody holds a page, and go on where it stopped."""
        file = self.world.random.choice(machine.files)
        whole, last = PgRange(0, file.nr_pages), file.nr_pages - 1
        yield from self._convert_file(file.number, whole, Faultability.ALL)
        hold = yield from self._pin(file.number, PgRange(last, last + 1))
        try:
            yield from self._convert_file(file.number, whole, Faultability.GUEST)
        except Contended as error:
            offset = int(error.numbers["error_offset"])
        else:
            # Somebody has ended the hold.
            return
        if hold in self.holds:
            self.holds.remove(hold)
            yield from self._unpin(hold)
        rest = PgRange(offset // PAGE_SIZE, whole.stop)
        yield from self._convert_file(file.number, rest, Faultability.GUEST)

    def guest_access(self, machine: Machine) -> Op[None]:
        """Load or store as a vCPU, through stage 2; the default policy converts."""
        random = self.world.random
        gfn = self.pick(machine.gfns(random)).start
        access = random.choice((Access.BY_ATTRIBUTE, Access.BY_ATTRIBUTE, *Access))
        yield from self._guest_access(machine.vm, gfn, access)

    def _guest_access(self, vm: Vm, gfn: int, access: Access) -> Op[None]:
        write = self.world.random.random() < 0.6
        for _ in range(ATTEMPTS_MAX):
            if (yield from self._guest_attempt(vm, gfn, access, write=write)):
                return
        self.world.marks["guest access given up"] += 1

    def _guest_attempt(
        self, vm: Vm, gfn: int, access: Access, *, write: bool
    ) -> Op[bool]:
        """Try once; True where the access is over, done or not."""
        if not vm.guest_alive:
            return True
        random = self.world.random
        view = self.host.tlb.get((vm.name, gfn))
        if view is None:
            npages = random.choice((1, 1, 1, 4))
            outcome = yield from fault(vm, Fault(gfn, npages, access, write))
            match outcome:
                case Retry():
                    yield from perform(Wait(random.randint(1, RETRY_MAX)))
                    return False
                case MemoryFault(errno=Errno.EHWPOISON):
                    self.world.marks["a guest met a memory error"] += 1
                    return True
                case MemoryFault():
                    back = yield from answer(vm, Policy.CONVERT, outcome)
                    return back != 0
                case Mapped(window=window):
                    # Its notice may be under way already, as VcpuRun knows.
                    view = self.host.view_of(vm.name, window)
                    late = vm.invalidation.must_retry(outcome.seq, outcome.gfns)
                    if late or view is None:
                        return False
                    self.host.tlb[vm.name, gfn] = view
                case _:
                    return True
        slot = vm.memslots.find(gfn)
        if slot is None or not vm.guest_alive:
            return True
        number, pages = pages_of(slot, PgRange(gfn, gfn + 1))
        who = guest_process(vm.name)
        done = yield from perform(Touch(who, number, view, pages.start, write))
        self.world.marks["guest access served"] += bool(done)
        if not done:
            self.host.tlb.pop((vm.name, gfn), None)
        return bool(done)

    def _pick_to_fallocate(self, file: File) -> PgRange:
        """Pick pages, mostly such as fallocate of the lineage takes."""
        pages = self.pick(PgRange(0, file.nr_pages))
        if self.world.play.whole_folios and self.world.random.random() < 0.9:
            return pages.rounded_out(order_of(self.shape.page_size))
        return pages
