"""One host: the three shipping cores, and who answers which of their effects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from gmem.effects import Effect, Op
from gmem.guest_memfd.core import effects as fx
from gmem.guest_memfd.core.faultability import opposite
from gmem.guest_memfd.core.inode import InodeOptions
from gmem.guest_memfd.core.inodes import ByteRange
from gmem.guest_memfd.core.registry import GuestMemfdCore
from gmem.guest_memfd.core.values import (
    AttributesCall,
    GuestPage,
    UserspaceSide,
    ViewKind,
    WrongAccess,
)
from gmem.host_allocator.core.host_memory import HostMemory
from gmem.uapi.errors import KernelError, Reason
from gmem.uapi.flags import Faultability, MemoryAttribute
from gmem.uapi.pages import PAGE_SIZE, Gfn, PgOff, PgRange
from gmem.vmm.core import effects as vx
from gmem.vmm.core.invalidate import Notice
from gmem.vmm.core.registry import VmRegistry
from tests.sim.allocations import Allocations
from tests.sim.errors import MemoryErrors
from tests.sim.memory import Access, Memory, Mix, guest_process, is_guest
from tests.sim.world import Answer, Outcome, World, outcome_of

GUEST_MEMFD_KEY: Final = "guest_memfd"
GUEST_PID: Final = 4711
VMM_TARGET: Final = "vmm-0"
_MEANT: Final = {None: None, False: Faultability.GUEST, True: Faultability.ALL}
ASKS_MAX: Final = 64
"""Folios asked for one access, each taken away again before it was used."""


@dataclass(frozen=True, slots=True)
class Ask(Effect[Any]):
    """A script's request to a service, which drives `make()`."""

    service: str
    name: str
    make: Callable[[], Op[Any]] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Wait(Effect[None]):
    """Let others go first."""

    ticks: int


@dataclass(frozen=True, slots=True)
class Touch(Effect[bool]):
    """One load or store of process `who`; the reply is False where it dies."""

    who: str
    inode: int
    view: ViewKind
    pgoff: int
    write: bool


@dataclass(frozen=True, slots=True)
class Window:
    """Pages of a view that a process has mapped, touched or not."""

    who: str
    inode: int
    view: ViewKind
    pages: PgRange


class Host:
    """The cores of one host, joined by the messages of a world."""

    def __init__(self, world: World, memory: HostMemory) -> None:
        self.world = world
        self.allocator = memory
        self.guest_memfd = GuestMemfdCore()
        self.vmm = VmRegistry("h")
        self.memory = Memory(world)
        # Whose claim at the allocator is not guest_memfd's.
        self.hog = memory.reserve(PAGE_SIZE, 1, owner="hog")
        self.errors = MemoryErrors(world, memory, self.guest_memfd)
        self.allocations = Allocations(world, memory, self.errors)
        # Who wants to hear of a finished conversion.
        self.on_converted: list[Callable[[list[ByteRange], Faultability], None]] = []
        # And who of one that was refused.
        self.on_refused: Callable[
            [list[ByteRange], Faultability, KernelError], None
        ] = lambda ranges, to, error: None
        # What the guest processes remember of stage 2: (VM, gfn) -> view.
        self.tlb: dict[tuple[str, int], ViewKind] = {}
        # Where faultability flipped when a checker last looked, by inode.
        self.flips: dict[int, list[int]] = {}
        # What is mapped where: by guest process and window; by the clients.
        self._windows: dict[tuple[str, int], Window] = {}
        self.client_views: dict[int, None] = {}
        # What was ever bound of an inode.
        self.bound: dict[int, list[PgRange]] = {}
        world.performers.local.update(self._local())
        world.performers.remote.update(self._of_guest_memfd())
        world.performers.remote.update(self._of_vmm())

    def _local(self) -> dict[type[Effect[Any]], Callable[[Any], object]]:
        return {
            vx.NotifyGuest: lambda e: self._notify(e.vm, e.notice),
            vx.UnmapWindow: self._unmap_window,
            vx.RequireDescriptor: _nothing,
            # No history waits for holders, and none has a crash to recover from.
            fx.ScheduleMerge: self._schedule_merge,
            fx.TellReleased: _nothing,
            fx.DisarmLease: _nothing,
            fx.Record: _nothing,
        }

    def _of_guest_memfd(self) -> dict[type[Effect[Any]], Callable[[Any, Answer], None]]:
        blocking = {
            kind: partial(self._blocking, handler)
            for kind, handler in self.memory.blocking.items()
        }
        return {
            **blocking,
            fx.RemoveInode: self._remove_inode,
            fx.DrainLru: self._drain,
            fx.InvalidateBegin: partial(self._upcall, True),
            fx.InvalidateEnd: partial(self._upcall, False),
        }

    def _of_vmm(self) -> dict[type[Effect[Any]], Callable[[Any, Answer], None]]:
        return {
            vx.CreateFile: self._create_file,
            vx.BindSlot: self._bind,
            vx.UnbindSlot: self._unbind,
            vx.GetPfn: self._get_pfn,
            vx.Convert: self._convert,
            vx.Populate: self._populate,
            vx.StartGuest: lambda _, answer: self._soon(answer, GUEST_PID),
            vx.EndGuest: self._end_guest,
            vx.MapUserspace: self._map_userspace,
            vx.MapGuestView: partial(self._map_view, ViewKind.GUEST),
            vx.MapHostView: partial(self._map_view, ViewKind.HOST),
            vx.IdentifyDescriptor: self._identify,
            # Of the scripts.
            Ask: self._ask,
            Touch: self._touch,
            Wait: lambda e, answer: self.world.later(
                e.ticks, partial(answer, Outcome())
            ),
        }

    # guest_memfd tells the vmm: sent once, never lost, never refused.

    def _upcall(
        self,
        begin: bool,
        effect: fx.InvalidateBegin | fx.InvalidateEnd,
        answer: Answer,
    ) -> None:
        self.world.after_a_while(partial(self._tell, effect, begin, answer))

    def _tell(
        self,
        effect: fx.InvalidateBegin | fx.InvalidateEnd,
        begin: bool,
        answer: Answer,
    ) -> None:
        self.world.changed = True
        if effect.vm in self.vmm.names():
            vm = self.vmm.get(effect.vm)
            change = vm.invalidate_begin if begin else vm.invalidate_end
            self._notify(effect.vm, change(GUEST_MEMFD_KEY, effect.gfns))
        self.world.after_a_while(partial(answer, Outcome()))

    # The vmm asks guest_memfd.

    def _drive(
        self, name: str, make: Callable[[], Op[Any]], answer: Answer, *, once: bool
    ) -> None:
        def carry_out(done: Answer) -> None:
            self.world.start(name, make(), done)

        self.world.call("guest_memfd", carry_out, answer, remembered=once)

    def _create_file(self, effect: vx.CreateFile, answer: Answer) -> None:
        options = InodeOptions(
            effect.size,
            effect.page_size,
            effect.lineage,
            vm=effect.vm,
            support_shared=effect.support_shared,
            init_private=effect.init_private,
            mmap=effect.mmap,
            init_shared=effect.init_shared,
            private_memory=effect.private_memory,
        )

        def op() -> Op[str]:
            return str((yield from self.guest_memfd.create(options)))

        self._drive(f"create for {effect.vm}", op, answer, once=True)

    def _bind(self, effect: vx.BindSlot, answer: Answer) -> None:
        pages = PgRange.of_bytes(effect.offset, effect.size)
        mix = Mix(int(effect.name), pages)
        side = effect.userspace
        userspace = UserspaceSide(side.st_ino, side.offset) if side else None

        def op() -> Op[bool]:
            if self.world.play.bind_resets:
                self.memory.mixes.append(mix)
            try:
                yield from self.guest_memfd.bind(
                    int(effect.name),
                    effect.vm,
                    effect.slot,
                    base_gfn=Gfn(effect.base_gfn),
                    offset=effect.offset,
                    size=effect.size,
                    host_faultable=effect.host_faultable,
                    vmm_target=VMM_TARGET,
                    userspace=userspace,
                )
            finally:
                mix.until = self.world.now
            self.bound.setdefault(int(effect.name), []).append(pages)
            return self.guest_memfd.supports_shared(int(effect.name))

        self._drive(f"bind {effect.name}", op, answer, once=True)

    def _unbind(self, effect: vx.UnbindSlot, answer: Answer) -> None:
        number = int(effect.name)
        self._drive(
            f"unbind {number}",
            lambda: self.guest_memfd.unbind(number, effect.vm, effect.slot),
            answer,
            once=True,
        )

    def _get_pfn(self, effect: vx.GetPfn, answer: Answer) -> None:
        def op() -> Op[vx.Frame]:
            page = yield from self.guest_memfd.get_pfn(
                int(effect.name),
                effect.vm,
                effect.slot,
                Gfn(effect.gfn),
                meant=_MEANT[effect.meant_shared],
                nr_pages=effect.npages,
            )
            return _frame(page)

        self._drive(f"get_pfn {effect.name} {effect.gfn:#x}", op, answer, once=False)

    def _schedule_merge(self, effect: fx.ScheduleMerge) -> None:
        self.world.marks["merge after the inode"] += 1
        self.world.after_a_while(
            lambda: self.world.start(
                f"merge {effect.number}",
                self.guest_memfd.merge(effect.number),
                lambda _: None,
            )
        )

    def convert_file(self, target: ByteRange, to: Faultability) -> Op[None]:
        """Convert a file by its own ioctl."""
        work = [target] if self._differs(target, to) else []
        core, number, at = self.guest_memfd, target.inode, target.offset
        if self.world.play.attributes2:
            private = MemoryAttribute.PRIVATE if to is Faultability.GUEST else 0
            op = core.attributes_ioctl(number, AttributesCall(at, target.size, private))
        else:
            op = core.convert_ioctl(
                number, to, offset=at, size=target.size, error_offset=0
            )
        try:
            yield from op
        except KernelError as error:
            self.on_refused([target], to, error)
            raise
        self._converted(work, to)

    def _convert(self, effect: vx.Convert, answer: Answer) -> None:
        ranges = [ByteRange(int(r.name), r.offset, r.size) for r in effect.ranges]
        mixes = [Mix(r.inode, PgRange.of_bytes(r.offset, r.size)) for r in ranges]
        to = Faultability.ALL if effect.to_shared else Faultability.GUEST

        def op() -> Op[None]:
            self.memory.mixes += mixes
            work = [r for r in ranges if self._differs(r, to)]
            try:
                yield from self.guest_memfd.convert(ranges, to, validate_only=False)
            except KernelError as error:
                self._mark_refusal(error, effect)
                self.on_refused(ranges, to, error)
                for mix in mixes:
                    mix.until = self.world.now
                raise
            for mix in mixes:
                self.memory.mixes.remove(mix)
            self._converted(work, to)

        word = "to shared" if effect.to_shared else "to private"
        self._drive(f"convert {word}", op, answer, once=True)

    def _converted(self, work: list[ByteRange], to: Faultability) -> None:
        for hear in self.on_converted:
            hear(work, to)

    def _differs(self, target: ByteRange, to: Faultability) -> bool:
        """Tell whether a conversion has work here: else the core does nothing."""
        inode = self.guest_memfd._inodes.get(target.inode)
        pages = PgRange.of_bytes(target.offset, target.size)
        return inode is not None and inode.faultability.any_in(pages, opposite(to))

    def _mark_refusal(self, error: KernelError, effect: vx.Convert) -> None:
        if error.reason is Reason.PAGE_IN_USE:
            self.world.marks["refused conversion"] += 1
        if error.reason is Reason.VMEMMAP_RESTORE_FAILED and effect.to_shared:
            self.world.marks["rollback after a failed split"] += 1

    def _populate(self, effect: vx.Populate, answer: Answer) -> None:
        target = effect.target
        where = ByteRange(int(target.name), target.offset, target.size)
        self._drive(
            f"populate {target.name}",
            lambda: self.guest_memfd.populate(where, effect.descriptor, 0),
            answer,
            once=True,
        )

    # The vmm asks its guest processes.

    def _end_guest(self, effect: vx.EndGuest, answer: Answer) -> None:
        assert not [w for vm, w in self._windows if vm == effect.vm]
        for key in [key for key in self.tlb if key[0] == effect.vm]:
            del self.tlb[key]
        self._soon(answer)

    def _map_userspace(self, effect: vx.MapUserspace, answer: Answer) -> None:
        pages = PgRange.of_bytes(effect.offset, effect.size)
        number = int(effect.descriptor)
        window = Window(guest_process(effect.vm), number, ViewKind.HOST, pages)
        self._open(window, effect.vm, effect.window, answer)

    def _map_view(
        self,
        view: ViewKind,
        effect: vx.MapGuestView | vx.MapHostView,
        answer: Answer,
    ) -> None:
        pages = PgRange.of_bytes(effect.offset, effect.size)
        number = int(effect.name)
        window = Window(guest_process(effect.vm), number, view, pages)
        self._open(window, effect.vm, effect.window, answer)

    def _identify(self, effect: vx.IdentifyDescriptor, answer: Answer) -> None:
        # A descriptor is called after the inode whose host view it is.
        number = int(effect.descriptor)
        self._soon(answer, vx.FileIdentity(0, number, effect.offset))

    def _open(self, window: Window, vm: str, number: int, answer: Answer) -> None:
        def opened(outcome: Outcome) -> None:
            if outcome.error is None:
                self._windows[vm, number] = window
            answer(outcome)

        make = partial(self.open_view, window.inode, window.view, vm)
        name = f"open {window.view.name} {window.inode}"
        self._drive(name, make, opened, once=True)

    def open_view(self, number: int, view: ViewKind, vm: str = "") -> Op[None]:
        """Open a view, as the broker does for whoever shows a token."""
        self.guest_memfd.check_open_view(number, view, vm)
        self.guest_memfd.view_opened(number, view)
        yield from ()

    def _unmap_window(self, effect: vx.UnmapWindow) -> None:
        window = self._windows.pop((effect.vm, effect.window), None)
        if window is not None:
            self.memory.drop_mappings(window.who, window.inode, window.pages)
            self.release_view(window.inode, window.view)

    def view_of(self, vm: str, window: int) -> ViewKind | None:
        """Return the view that a window of a guest process shows, if it is there."""
        found = self._windows.get((vm, window))
        return None if found is None else found.view

    def _has_mapped(self, touch: Touch) -> bool:
        if not is_guest(touch.who):
            return touch.inode in self.client_views
        return any(
            (window.who, window.inode) == (touch.who, touch.inode)
            and window.view is touch.view
            and touch.pgoff in window.pages
            for window in self._windows.values()
        )

    def release_view(self, number: int, view: ViewKind) -> None:
        """Close a file of a view: the kernel says so some time later."""
        self.world.after_a_while(
            lambda: self.world.start(
                f"release {view.name} {number}",
                self.guest_memfd.view_released(number, view),
                lambda _: None,
            )
        )

    def _notify(self, vm: str, notice: Notice) -> None:
        for key in [k for k in self.tlb if k[0] == vm and k[1] in notice.gfns]:
            del self.tlb[key]

    # Scripts and processes.

    def _ask(self, effect: Ask, answer: Answer) -> None:
        def carry_out(done: Answer) -> None:
            self.world.start(effect.name, _deferred(effect.make), done)

        self.world.call(effect.service, carry_out, answer)

    def _touch(self, effect: Touch, answer: Answer, asks: int = 0) -> None:
        self.world.after_a_while(partial(self._do_touch, effect, answer, asks))

    def _do_touch(self, effect: Touch, answer: Answer, asks: int) -> None:
        self.world.changed = True
        if not self._has_mapped(effect):
            answer(Outcome(False))
            return
        match self.memory.access(
            effect.who, effect.inode, effect.view, effect.pgoff, write=effect.write
        ):
            case Access.SERVED:
                answer(Outcome(True))
            case Access.REFUSED:
                answer(Outcome(False))
            case Access.WAIT:
                self._touch(effect, answer, asks)
            case Access.HOLE:
                if asks == ASKS_MAX:
                    answer(Outcome(False))
                    return
                self._host_fault(effect, answer, asks + 1)

    def _host_fault(self, effect: Touch, answer: Answer, asks: int) -> None:
        def answered(outcome: Outcome) -> None:
            if outcome.error is not None or hasattr(outcome.value, "reason"):
                answer(Outcome(False))
            else:
                self._touch(effect, answer, asks)

        op = self.guest_memfd.host_fault(effect.inode, PgOff(effect.pgoff))
        self.world.start(f"host_fault {effect.inode} {effect.pgoff:#x}", op, answered)

    def _blocking(
        self, handler: Callable[[Any], Any], effect: Effect[Any], answer: Answer
    ) -> None:
        def act() -> None:
            self.world.changed = True
            outcome = outcome_of(lambda: handler(effect))
            self.world.after_a_while(partial(answer, outcome))

        self.world.after_a_while(act)

    def _remove_inode(self, effect: fx.RemoveInode, answer: Answer) -> None:
        if self.world.asker(effect).name.startswith("unpin"):
            self.world.marks["evict after the last pin"] += 1
        self._blocking(self.memory.blocking[fx.RemoveInode], effect, answer)

    def _drain(self, effect: fx.DrainLru, answer: Answer) -> None:
        del effect
        self.world.marks["drained"] += 1
        self._soon(answer)

    def _soon(self, answer: Answer, value: object = None) -> None:
        self.world.after_a_while(partial(answer, Outcome(value)))


def _frame(page: GuestPage | WrongAccess) -> vx.Frame:
    match page:
        case GuestPage(pfn=pfn, order=order, shared=shared, nr_pages=nr_pages):
            return vx.Frame(pfn, order, shared=shared, npages=nr_pages)
        case WrongAccess():
            return vx.Frame(0, 0, matches=False)


def _nothing(effect: Effect[Any]) -> None:
    """Answer what nobody in this world is interested in."""


def _deferred(make: Callable[[], Op[Any]]) -> Op[Any]:
    """Make the operation in its own first step, where a refusal is its outcome."""
    return (yield from make())
