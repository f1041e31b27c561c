"""Where memory errors of a history come from, and how they are forgotten."""

from __future__ import annotations

from gmem.effects import Op
from gmem.guest_memfd.core.memory_failure import KillPolicy
from gmem.uapi.errors import Errno
from gmem.uapi.pages import PAGE_SIZE
from tests.sim.host import Host
from tests.sim.machines import Machines


class Strikes(Machines):
    """Errors that hit any page of any inode, and any frame, at any step."""

    def strike(self) -> None:
        """Have an error come to a page of a file or to a frame, or one be forgotten."""
        random, errors = self.world.random, self.host.errors
        place = self._place()
        if errors.bad and random.random() < 0.25:
            self.run("forget an error", self._forget(random.choice(list(errors.bad))))
        elif place is not None and random.random() < 0.6:
            self.run("poison a page", self.poison(*place))
        else:
            self.run("poison a frame", self._give(self._frame(place)))

    def _place(self) -> tuple[int, int] | None:
        """Pick any page of any file, a hole too."""
        core = self.host.guest_memfd
        if not core.numbers:
            return None
        number = self.world.random.choice(list(core.numbers))
        return number, self.pick(core.inode(number).whole).start

    def _frame(self, place: tuple[int, int] | None) -> int:
        """Return the frame of a page, or any one of the host."""
        if place is not None and self.world.random.random() < 0.8:
            pfn = _frame_at(self.host, *place)
            if pfn is not None:
                return pfn
        return self.world.random.randrange(self.host.allocator.nodes[-1].frames.stop)

    def poison(self, number: int, pgoff: int) -> Op[None]:
        host, kill = self.host, self.world.random.choice(list(KillPolicy))

        def op() -> Op[None]:
            inject = host.guest_memfd.inject_memory_error
            failure = yield from host.errors.change(
                number, inject(number, pgoff * PAGE_SIZE, kill)
            )
            self.world.marks["a page lost"] += 1
            want = Errno.EBUSY if kill is KillPolicy.DEFAULT else 0
            if failure.errno != want or pgoff not in failure.pages:
                self.world.broken(f"{failure} of {number}, {pgoff:#x}: not {want!r}")

        yield from self.ask("guest_memfd", f"poison {number} {pgoff:#x}", op)

    def _give(self, pfn: int) -> Op[None]:
        def op() -> Op[None]:
            self.host.errors.give(pfn)
            self.world.marks["a frame lost"] += 1
            yield from ()

        yield from self.ask("host_allocator", f"poison frame {pfn:#x}", op)

    def _forget(self, pfn: int) -> Op[None]:
        """Forget an error, in the file that has the frame or at the allocator."""
        host = self.host
        place = _place_of(host, pfn)
        if place is not None and self.world.random.random() < 0.5:
            number, pgoff = place
            yield from self.ask(
                "guest_memfd",
                f"unpoison {number} {pgoff:#x}",
                lambda: host.errors.change(
                    number, host.guest_memfd.unpoison(number, pgoff * PAGE_SIZE)
                ),
            )
        else:

            def op() -> Op[None]:
                host.errors.take(pfn)
                yield from ()

            yield from self.ask("host_allocator", f"unpoison frame {pfn:#x}", op)
        self.world.marks["an error forgotten"] += 1

    def forget_errors(self) -> None:
        """Forget all errors that there are."""
        for pfn in list(self.host.errors.bad):
            self.host.errors.take(pfn)


def _frame_at(host: Host, number: int, pgoff: int) -> int | None:
    """Return the frame that the filemap of an inode has at a page."""
    inode = host.guest_memfd.inode(number)
    index = inode.unit_of(pgoff).start
    entry = inode.filemap.get(index)
    return None if entry is None else entry.folio.pfn + pgoff - index


def _place_of(host: Host, pfn: int) -> tuple[int, int] | None:
    """Return inode and page whose filemap has a frame."""
    for number, inode in host.guest_memfd._inodes.items():
        for index in inode.filemap.present(inode.whole):
            entry = inode.filemap.get(index)
            pgoff = index + pfn - entry.folio.pfn if entry is not None else -1
            if pgoff in inode.unit_of(index):
                return number, pgoff
    return None
