"""Guest memory as one vCPU's program sees it: translate, copy, or leave the guest.

An access is cut into pieces; each is translated by the TLB, or else by asking the vmm.
A piece that the kernel refuses (EFAULT: the page is being converted, or is not there)
is asked for again, a bounded number of times, and then leaves with a memory fault.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from gmem.uapi.pages import PAGE_SHIFT, PgRange
from gmem.vmm.core.exits import Access, Exit, MemoryFault, Mmio
from gmem.vmm.guest.messages import Emulate, Message, TryAgain
from gmem.vmm.guest.tlb import Hit, Tlb
from gmem.vmm.guest.windows import CHUNK_BYTES, Scratch, Window

REFUSED_MAX: Final = 8
"""How often one page may be refused, without progress, before the guest leaves."""
REFUSED_SECONDS: Final = 0.002
"""The first pause after a refusal; each further one is twice as long."""
INVALIDATION_SECONDS_MAX: Final = 60.0
"""How long a fault waits for an invalidation of its page: 1G of dirty pages take 8."""
MMIO_BYTES_MAX: Final = 8


class Link(Protocol):
    """One vCPU's line to the vmm, during one run of a program."""

    def check(self) -> None:
        """Raise Stopped when the run was ended by its caller."""

    def ask(self, gfn: int, npages: int, access: Access, *, write: bool) -> Message:
        """Tell the vmm of a miss; return MapFrames, TryAgain, Emulate or Resume."""

    def leave(self, reached: Exit) -> int:
        """Exit to the vmm; return what it answers."""


@dataclass(frozen=True, slots=True)
class Span:
    """What an instruction accesses: bytes `[gpa, gpa + size)`, and how."""

    gpa: int
    size: int
    access: Access
    write: bool

    def rest(self, done: int) -> PgRange:
        """Return the guest frames that are still to be accessed."""
        stop = self.gpa + self.size
        return PgRange((self.gpa + done) >> PAGE_SHIFT, -(-stop >> PAGE_SHIFT))

    def suits(self, hit: Hit) -> bool:
        """Tell whether a translation serves this kind of access."""
        if self.write and not hit.translation.writable:
            return False
        if self.access is Access.BY_ATTRIBUTE:
            return True
        return hit.translation.private is (self.access is Access.PRIVATE)


@dataclass(slots=True)
class Memory:
    """What all vCPUs of the VM share: translations and windows."""

    tlb: Tlb
    windows: dict[int, Window] = field(default_factory=dict)


class Refusals:
    """How often, and since when, one page was refused without progress.

    While something is invalidated a refusal means nothing: the split of a huge page
    closes its neighbours too. Those are waited for, and only bounded by time.
    """

    def __init__(self, tlb: Tlb) -> None:
        self._tlb = tlb
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._count = 0
        self._since: float | None = None

    def pause(self) -> bool:
        """Wait before the page is asked for again; False when it was too often."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        left = self._since + INVALIDATION_SECONDS_MAX - now
        if self._count >= REFUSED_MAX or left <= 0:
            return False
        if not self._tlb.wait_idle(left):
            time.sleep(REFUSED_SECONDS * (1 << self._count))
            self._count += 1
        return True


class VcpuMemory:
    """Guest memory for one vCPU; `link` is the run that it executes now."""

    def __init__(self, memory: Memory, link: Link) -> None:
        self._memory = memory
        self._link = link
        self._scratch = Scratch()

    def close(self) -> None:
        """Give the scratch file back."""
        self._scratch.close()

    def read(
        self, gpa: int, size: int, access: Access, consume: Callable[[memoryview], None]
    ) -> None:
        """Give `consume` the bytes, in order, piece by piece."""
        span = Span(gpa, size, access, write=False)
        done = 0
        while done < size:
            copied = self._piece(span, done)
            consume(self._scratch.memory[:copied])
            done += copied

    def write(
        self, gpa: int, size: int, access: Access, produce: Callable[[memoryview], None]
    ) -> None:
        """Let `produce` fill the next bytes, then write them, piece by piece.

        `produce` is called once for each piece; a piece that gets only half through is
        moved up, so that what was produced is not asked for again.
        """
        span = Span(gpa, size, access, write=True)
        done = 0
        while done < size:
            chunk = min(size - done, CHUNK_BYTES)
            produce(self._scratch.memory[:chunk])
            put = 0
            while put < chunk:
                copied = self._piece(span, done + put, limit=chunk - put)
                put += copied
                left = bytes(self._scratch.memory[copied : copied + chunk - put])
                self._scratch.memory[: len(left)] = left
            done += chunk

    def _piece(self, span: Span, done: int, limit: int = CHUNK_BYTES) -> int:
        """Copy bytes from `done` on, once and completely; return how many."""
        refusals = Refusals(self._memory.tlb)
        while True:
            self._link.check()
            hit = self._memory.tlb.lookup(span.rest(done))
            if hit is None or not span.suits(hit):
                copied = self._missed(span, done, limit)
                if copied:
                    return copied
                continue
            copied = self._copy(hit, span, done, limit)
            if self._memory.tlb.is_stale(hit):
                continue
            if copied:
                return copied
            self._refused(hit, span.gpa + done, refusals)

    def _copy(self, hit: Hit, span: Span, done: int, limit: int) -> int:
        """Copy what `hit` reaches; return 0 where the page was refused."""
        gpa = span.gpa + done
        reach = (hit.gfns.stop << PAGE_SHIFT) - gpa
        window = self._memory.windows.get(hit.translation.window)
        if window is None:
            return 0
        target = window.slice(gpa, min(span.size - done, limit, reach))
        try:
            return (
                self._scratch.put(target) if span.write else self._scratch.fetch(target)
            )
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            return 0

    def _missed(self, span: Span, done: int, limit: int) -> int:
        """Ask the vmm; return the bytes moved by MMIO, 0 where to look again."""
        gfns = span.rest(done)
        reply = self._link.ask(gfns.start, len(gfns), span.access, write=span.write)
        match reply:
            case TryAgain(seq=seq):
                self._memory.tlb.wait_past(seq, INVALIDATION_SECONDS_MAX)
            case Emulate():
                return self._emulate(span, done, limit)
            case _:
                # A mapping, or an exit that was answered: look again.
                pass
        return 0

    def _emulate(self, span: Span, done: int, limit: int) -> int:
        gpa = span.gpa + done
        size = min(span.size - done, limit, MMIO_BYTES_MAX - gpa % MMIO_BYTES_MAX)
        memory = self._scratch.memory
        data = bytes(memory[:size]) if span.write else b""
        value = self._link.leave(Mmio(gpa, size, span.write, data))
        if not span.write:
            memory[:size] = value.to_bytes(MMIO_BYTES_MAX, "little")[:size]
        return size

    def _refused(self, hit: Hit, gpa: int, refusals: Refusals) -> None:
        """Drop the page and pause; leave with a memory fault when it was too often."""
        gfn = gpa >> PAGE_SHIFT
        self._memory.tlb.drop(PgRange(gfn, gfn + 1))
        if not refusals.pause():
            self._link.leave(MemoryFault.of_page(gfn, private=hit.translation.private))
            refusals.clear()
